import numpy as np
import pytest

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.runtime.sampler import Sampler, SamplingParams, _pick, nucleus


def logits_of(*values):
    return np.array(values, np.float32)


def draw(params, logits, count):
    return [Sampler(params.override(seed=seed)).sample(logits) for seed in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy_takes_the_lowest_id_of_a_tie(temperature):
    assert Sampler(SamplingParams(temperature=temperature)).sample(logits_of(1, 3, 3, 2)) == 1


def test_temperature_shapes_the_distribution():
    logits = np.log(logits_of(0.5, 0.3, 0.2))
    shares = np.bincount(draw(SamplingParams(), logits, 4000), minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)
    hot = np.bincount(draw(SamplingParams(temperature=2.0), logits, 4000), minlength=3) / 4000
    want = np.sqrt([0.5, 0.3, 0.2])
    np.testing.assert_allclose(hot, want / want.sum(), atol=0.03)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = np.log(logits_of(0.2, 0.5, 0.3))
    assert set(draw(SamplingParams(top_p=0.5), logits, 50)) == {1}
    assert set(draw(SamplingParams(top_p=0.6), logits, 200)) == {1, 2}
    assert set(draw(SamplingParams(top_p=0.0), logits, 50)) == {1}


def test_nucleus_of_a_large_vocabulary_equals_full_sort():
    rng = np.random.default_rng(0)
    for scale in (0.1, 3.0):  # nearly flat: beyond the shortcut; peaked: within it
        weights = np.exp(np.round(rng.normal(size=5000) * scale, 1))
        probabilities = weights / weights.sum()
        order = np.lexsort((np.arange(5000), -probabilities))
        for top_p in (0.1, 0.5, 0.9, 0.999):
            count = np.searchsorted(np.cumsum(probabilities[order]), top_p) + 1
            assert nucleus(probabilities, top_p).tolist() == order[:count].tolist()


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_nucleus_of_float32_weights_equals_full_sort(scale):
    """Of 100000, which are neither sorted nor normalised; all alike, nearly flat and peaked."""
    rng = np.random.default_rng(1)
    weights = np.exp(rng.normal(size=100_000) * scale).astype(np.float32)
    order = np.lexsort((np.arange(len(weights)), -weights))
    sums = np.cumsum(weights[order].astype(np.float64))
    for top_p in (1e-6, 0.1, 0.5, 0.95, 0.99999):
        ids = nucleus(weights, top_p)
        assert ids.tolist() == order[: len(ids)].tolist()
        wanted, rounding = top_p * sums[-1], 1e-11 * sums[-1]
        assert sums[len(ids) - 1] >= wanted - rounding
        assert len(ids) == 1 or sums[len(ids) - 2] < wanted + rounding


def test_draws_have_the_shares_of_their_weights():
    rng = np.random.default_rng(2)
    weights = rng.exponential(size=3000).astype(np.float32)
    weights[rng.random(3000) < 0.5] = 0
    sums = np.cumsum(weights.astype(np.float64))
    for uniform in rng.random(2000):
        index = _pick(weights, uniform)
        assert weights[index] > 0
        low = sums[index - 1] if index else 0.0
        assert low - 1e-9 <= uniform * sums[-1] <= sums[index] + 1e-9


@pytest.mark.parametrize("weighted", [0, 511, 512, 700, 1023, 1299])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_tokens_that_are_ruled_out_are_never_drawn(weighted, uniform):
    weights = np.zeros(1300, np.float32)
    weights[weighted] = 0.1
    assert _pick(weights, uniform) == weighted
    weights[:] = 0
    weights[:weighted] = 1 / 3  # sums that are rounded, and nothing after them
    assert weighted == 0 or _pick(weights, uniform) < weighted


def test_penalties_follow_the_contract():
    params = SamplingParams(
        temperature=0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    sampler = Sampler(params)
    logits = logits_of(4.0, 0.5, -1.0)
    assert sampler.sample(logits) == 0
    # (4 - 0.5 - 0.25) / 2, the others untouched
    np.testing.assert_allclose(sampler.adjust(logits), [1.625, 0.5, -1.0])
    sampler._counts = {1: 2, 2: 1}
    # (0.5 - 0.5 - 0.5) * 2 and (-1 - 0.5 - 0.25) * 2
    np.testing.assert_allclose(sampler.adjust(logits), [4.0, -1.0, -3.5])


def test_penalties_do_not_touch_the_callers_logits():
    logits = logits_of(4.0, 0.5)
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=1.0))
    sampler.sample(logits)
    sampler.sample(logits)
    assert logits.tolist() == [4.0, 0.5]


def test_logit_bias_bans_and_forces():
    logits = logits_of(5.0, 4.0, 0.0)
    assert Sampler(SamplingParams(temperature=0, logit_bias={0: -100.0})).sample(logits) == 1
    assert Sampler(SamplingParams(temperature=0, logit_bias={2: 100.0})).sample(logits) == 2
    with pytest.raises(FairyError, match="token 3; allowed: 0 to 2"):
        Sampler(SamplingParams(logit_bias={3: 1.0})).sample(logits)


def test_same_seed_same_tokens():
    rng = np.random.default_rng(3)
    steps = rng.normal(size=(50, 100)).astype(np.float32)
    params = SamplingParams(top_p=0.9, seed=11)
    first, second = Sampler(params), Sampler(params)
    assert [first.sample(s) for s in steps] == [second.sample(s) for s in steps]
    other = Sampler(params.override(seed=12))
    assert [other.sample(s) for s in steps] != [Sampler(params).sample(s) for s in steps]


def test_masked_logits_are_never_drawn():
    logits = logits_of(1.0, -np.inf, np.finfo(np.float32).min)
    assert set(draw(SamplingParams(temperature=5.0), logits, 50)) == {0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused(bad):
    with pytest.raises(ModelFileError, match="returned the logit"):
        Sampler(SamplingParams()).sample(logits_of(1.0, bad, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; allowed: 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 1.1}, "top_p is 1.1; allowed: 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3; allowed: -2 to 2"),
        ({"frequency_penalty": True}, "frequency_penalty is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"logit_bias": {4: 1e9}}, "logit_bias of token 4"),
    ],
)
def test_validation_in_words(changes, message):
    with pytest.raises(FairyError, match=message):
        SamplingParams(**changes)


def test_defaults_come_from_the_config():
    params = SamplingParams.from_config({"temperature": 0.6, "top_p": None, "vocab_size": 9})
    assert params == SamplingParams(temperature=0.6)
    assert params.override(temperature=None, top_p=0.5).top_p == 0.5
