import numpy as np
import pytest

from fairy_compile.errors import FairyError

PROMPT = [(7 * i * i + 3) % 320 for i in range(40)]  # more than two chunks of 16


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_logits_match_an_independent_implementation(tiny, engine):
    from .tiny_library import reference_logits

    got = engine.prefill_logits(engine.add_sequence(), PROMPT)
    assert got.dtype == np.float32
    assert got.shape == (40, 320)
    close(got, reference_logits(tiny[1], PROMPT))


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_prefill_does_not_depend_on_chunks(make_engine, engine, chunk):
    whole = engine.prefill_logits(engine.add_sequence(), PROMPT)
    other = make_engine({"prefill_chunk_size": chunk})
    assert other.chunk == chunk
    close(other.prefill(other.add_sequence(), PROMPT), whole[-1])
    close(other.prefill_logits(other.add_sequence(), PROMPT), whole)
    assert other.counts["prefill"].calls == -(-len(PROMPT) // chunk)


def test_prefill_equals_token_by_token(engine):
    whole = engine.prefill_logits(engine.add_sequence(), PROMPT)
    sequence = engine.add_sequence()
    rows = [engine.decode([sequence], [token])[0] for token in PROMPT]
    close(np.stack(rows), whole)


def test_batch_of_four_equals_four_singles(engine):
    prompts = [PROMPT[:3], PROMPT[5:6], PROMPT[:33], PROMPT[10:20]]
    singles = []
    for prompt in prompts:
        sequence = engine.add_sequence()
        first = engine.prefill(sequence, prompt)
        singles.append((first, engine.decode([sequence], [9])[0]))
        engine.remove_sequence(sequence)
    batch = {engine.add_sequence(): prompt for prompt in prompts}
    firsts = engine.prefill_many(batch)
    assert list(firsts) == list(batch)
    seconds = engine.decode(list(batch), [9] * 4)
    assert seconds.shape == (4, 320)
    for i, sequence in enumerate(batch):
        close(firsts[sequence], singles[i][0])
        close(seconds[i], singles[i][1])
    assert engine.counts["batch_decode"].calls == 1
    assert engine.counts["batch_prefill"].calls == 3  # 47 tokens in chunks of 16


def test_fork_shares_the_prefix_and_both_go_on_alone(engine):
    parent = engine.add_sequence()
    engine.prefill(parent, PROMPT[:21])
    child = engine.fork(parent, 18)
    assert engine.length(child) == 18
    got_child = engine.prefill(child, [4, 5, 6])
    got_parent = engine.prefill(parent, PROMPT[21:25])
    close(got_child, engine.prefill(engine.add_sequence(), [*PROMPT[:18], 4, 5, 6]))
    close(got_parent, engine.prefill(engine.add_sequence(), PROMPT[:25]))


def test_popn_goes_back(engine):
    sequence = engine.add_sequence()
    engine.prefill(sequence, PROMPT[:30])
    engine.popn(sequence, 13)
    assert engine.length(sequence) == 17
    got = engine.prefill(sequence, [1, 2])
    close(got, engine.prefill(engine.add_sequence(), [*PROMPT[:17], 1, 2]))
    engine.popn(sequence, 19)
    close(engine.prefill(sequence, PROMPT[:2]), engine.prefill(engine.add_sequence(), PROMPT[:2]))


def test_popn_of_a_forked_sequence_leaves_the_other_alone(engine):
    parent = engine.add_sequence()
    engine.prefill(parent, PROMPT[:30])
    child = engine.fork(parent)
    engine.popn(child, 20)
    close(engine.prefill(child, [1]), engine.prefill(engine.add_sequence(), [*PROMPT[:10], 1]))
    close(engine.prefill(parent, [1]), engine.prefill(engine.add_sequence(), [*PROMPT[:30], 1]))


def test_context_overflow_names_both_numbers_and_changes_nothing(engine):
    sequence = engine.add_sequence()
    engine.prefill(sequence, PROMPT[:30])
    with pytest.raises(FairyError, match=r"65 tokens.*holds 64"):
        engine.prefill(sequence, PROMPT[:35])
    assert engine.length(sequence) == 30
    engine.prefill(sequence, PROMPT[:34])
    with pytest.raises(FairyError, match=r"65 tokens.*holds 64"):
        engine.decode([sequence], [1])


def test_full_cache_is_refused_before_native_code_sees_it(make_engine):
    engine = make_engine(kv_tokens=64)
    first, second = engine.add_sequence(), engine.add_sequence()
    engine.prefill(first, PROMPT)
    with pytest.raises(FairyError, match=r"room for 16 more tokens of 64, but 48 are needed"):
        engine.prefill(second, PROMPT)
    assert engine.length(second) == 0
    engine.prefill(second, PROMPT[:16])
    engine.remove_sequence(first)
    engine.prefill(second, PROMPT[16:])


def test_many_forks_fill_exactly_the_pages_they_are_charged(make_engine):
    engine = make_engine()
    rng = np.random.default_rng(0)
    lengths = {engine.add_sequence(): 0}
    for _ in range(300):
        sequence = int(rng.choice(list(lengths)))
        action = rng.integers(4)
        if action == 0 and len(lengths) < 4:
            position = int(rng.integers(lengths[sequence] + 1))
            lengths[engine.fork(sequence, position)] = position
        elif action == 1 and len(lengths) > 1:
            engine.remove_sequence(sequence)
            del lengths[sequence]
        elif action == 2:
            count = int(rng.integers(lengths[sequence] + 1))
            engine.popn(sequence, count)
            lengths[sequence] -= count
        else:
            count = min(int(rng.integers(1, 20)), 64 - lengths[sequence])
            if count:
                engine.prefill(sequence, PROMPT[:count])
                lengths[sequence] += count
        assert {s: engine.length(s) for s in engine.cache.sequences} == lengths
    for sequence in lengths:
        engine.remove_sequence(sequence)
    assert engine.cache.used_pages == 0


def test_failed_step_leaves_the_sequence_as_it_was(engine, monkeypatch):
    sequence = engine.add_sequence()
    engine.prefill(sequence, PROMPT[:5])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.library, "call_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(sequence, PROMPT[5:9])
    assert engine.length(sequence) == 5
    got = engine.prefill(sequence, PROMPT[5:9])
    close(got, engine.prefill(engine.add_sequence(), PROMPT[:9]))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([1, 320], "token 320 is outside the vocabulary; allowed: 0 to 319"),
        ([-1], "token -1 is outside"),
        ([1 << 40], "outside"),
        ([1.5], "integers"),
        (["a"], "integers"),
        ([[1, 2]], "flat sequence"),
    ],
)
def test_bad_tokens_are_refused(engine, tokens, message):
    sequence = engine.add_sequence()
    with pytest.raises(FairyError, match=message):
        engine.prefill(sequence, tokens)
    assert engine.length(sequence) == 0


def test_limits_of_sequences(make_engine):
    engine = make_engine(max_sequences=1)
    sequence = engine.add_sequence()
    with pytest.raises(FairyError, match="1 sequences are running; allowed: 1"):
        engine.add_sequence()
    with pytest.raises(FairyError, match="no sequence 7"):
        engine.decode([7], [1])
    with pytest.raises(FairyError, match="twice"):
        engine.decode([sequence, sequence], [1, 2])
    with pytest.raises(FairyError, match="2 tokens"):
        engine.decode([sequence], [1, 2])
    with pytest.raises(FairyError, match=r"max_sequences is 5.*1 to 4"):
        make_engine(max_sequences=5)


def test_context_can_be_lowered_but_not_raised(make_engine):
    engine = make_engine(context=20)
    with pytest.raises(FairyError, match=r"21 tokens.*holds 20"):
        engine.prefill(engine.add_sequence(), PROMPT[:21])
    assert make_engine({"context_window_size": 32}).context == 32
    with pytest.raises(FairyError, match="context is 65 tokens; this model was built for 1 to 64"):
        make_engine(context=65)


def test_prefill_chunk_can_be_lowered_but_not_raised(make_engine):
    engine = make_engine(prefill_chunk=5)
    assert engine.chunk == 5
    engine.prefill(engine.add_sequence(), PROMPT)
    assert engine.counts["prefill"].calls == 8
    for wrong in (0, 17):
        with pytest.raises(FairyError, match=f"prefill_chunk is {wrong} tokens.*1 to 16"):
            make_engine(prefill_chunk=wrong)


@pytest.mark.parametrize("name", ["context", "kv_tokens", "max_sequences", "prefill_chunk"])
@pytest.mark.parametrize("value", ["2", 2.5, True])
def test_sizes_that_are_no_integers_are_refused(make_engine, name, value):
    with pytest.raises(FairyError, match=f"{name} is {value!r}.*1 "):
        make_engine(**{name: value})


def test_counts_say_what_ran(engine):
    sequence = engine.add_sequence()
    engine.prefill(sequence, PROMPT[:20])
    for token in range(5):
        engine.decode([sequence], [token])
    counts = {name: (count.calls, count.tokens) for name, count in engine.counts.items()}
    assert counts["prefill"] == (2, 20)
    assert counts["decode"] == (5, 5)
    assert counts["embed"] == (7, 25)
    assert "batch_decode" not in counts
    assert engine.prefill_phase.tokens == 20
    assert engine.decode_phase.tokens == 5
    assert engine.decode_phase.tokens_per_second > 0


def test_unknown_device_and_missing_device(make_engine):
    with pytest.raises(FairyError, match="unknown device 'tpu9'"):
        make_engine(device="tpu9")
    with pytest.raises(FairyError, match="no device 'rocm'"):
        make_engine(device="rocm")
