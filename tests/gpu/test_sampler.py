"""An engine's GPU sampler, as the library of a model has it, against NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tvm

import fairy_compile as fc

pytestmark = pytest.mark.gpu

ROWS, SAMPLES = 3, 200


@pytest.fixture(scope="module")
def engine(any_built) -> Iterator:
    with fc.load(any_built) as model:
        yield model.engine


def run(engine, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """Call a function of the library that returns one tensor or several."""
    tensors = [tvm.runtime.tensor(array, engine.device) for array in arrays]
    result = engine.library.find(name)(*tensors)
    parts = [result] if hasattr(result, "numpy") else list(result)
    return [part.numpy() for part in parts]


@pytest.fixture(scope="module")
def drawn_from(engine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return probabilities of some rows, sorted, and where they stood, as the library does it."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((ROWS, 1, engine.vocab_size))).astype(np.float32)
    temperature = np.array([1.0, 0.5, 0.0], np.float32)
    probs = run(engine, "softmax_with_temperature", logits, temperature)[0]
    scaled = logits[:2, 0].astype(np.float64) / temperature[:2, None]
    want = np.exp(scaled - scaled.max(1, keepdims=True))
    # Fast exponentials of arguments up to 50 err by 50 2^-22, sums and quotients by less.
    np.testing.assert_allclose(probs[:2, 0], want / want.sum(1, keepdims=True), rtol=2e-5)
    assert probs[2, 0].argmax() == logits[2, 0].argmax()
    assert probs[2, 0].max() == 1
    probs = np.ascontiguousarray(probs[:, 0])
    ordered, index = run(engine, "argsort_probs", probs)
    return probs, ordered, index


def test_sorting(drawn_from) -> None:
    probs, ordered, index = drawn_from
    np.testing.assert_array_equal(index, np.argsort(-probs, axis=1, kind="stable"))
    np.testing.assert_array_equal(ordered, np.take_along_axis(probs, index, 1))


def test_draws(engine, drawn_from) -> None:
    probs, ordered, index = drawn_from
    rng = np.random.default_rng(1)
    uniform = rng.random(SAMPLES).astype(np.float32)
    row_of = rng.integers(0, ROWS, SAMPLES).astype(np.int32)
    top_p = np.array([0.9, 0.5, 0.7], np.float32)
    drawn = run(engine, "multinomial_from_uniform", probs, uniform, row_of)[0]
    nucleus = run(engine, "sample_with_top_p", ordered, index, uniform, row_of, top_p)[0]
    for u, row, token, kept in zip(uniform, row_of, drawn, nucleus, strict=True):
        assert_drawn(probs[row].astype(np.float64), u, token)
        sorted_row = ordered[row].astype(np.float64)
        before = np.cumsum(sorted_row) - sorted_row
        inside = np.where(before < top_p[row] - 1e-6, sorted_row, 0)
        assert_drawn(inside, u, int(np.flatnonzero(index[row] == kept)[0]))


def test_probabilities_of_draws(engine, drawn_from) -> None:
    probs, ordered, index = drawn_from
    vocab = engine.vocab_size
    row_of, token = np.array([0, 2, 1], np.int32), np.array([5, 0, vocab - 1], np.int32)
    offset = np.array([0, 5, vocab, 2 * vocab + 3], np.int32)
    found = run(engine, "sampler_take_probs", probs, index, row_of, token, offset)
    np.testing.assert_array_equal(found[0], probs[row_of, token])
    np.testing.assert_array_equal(found[1], ordered[offset // vocab, offset % vocab])
    np.testing.assert_array_equal(found[2], index[offset // vocab, offset % vocab])


def test_nucleus_renormalised(engine, drawn_from) -> None:
    probs, ordered, index = drawn_from
    top_p = np.array([0.9, 0.5, 0.7], np.float32)
    kept = run(engine, "renormalize_by_top_p", probs, top_p, np.zeros((ROWS, 3), np.float32))[0]
    for row in range(ROWS):
        count = int(np.searchsorted(np.cumsum(ordered[row].astype(np.float64)), top_p[row])) + 1
        want = np.zeros(engine.vocab_size)
        want[index[row, :count]] = ordered[row, :count]
        np.testing.assert_allclose(kept[row], want / want.sum(), rtol=1e-5)


def test_logits_changed_in_place(engine) -> None:
    rng = np.random.default_rng(2)
    vocab = engine.vocab_size
    logits = rng.standard_normal((2, vocab)).astype(np.float32)
    on_device = tvm.runtime.tensor(logits, engine.device)

    def change(name: str, *arrays: np.ndarray) -> np.ndarray:
        tensors = [tvm.runtime.tensor(array, engine.device) for array in arrays]
        engine.library.find(name)(on_device, *tensors)
        return on_device.numpy()

    rows, entries = np.array([0, 1, 1], np.int32), np.array([7, 3, vocab - 1], np.int32)
    bias = np.array([0.5, -1.0, 2.0], np.float32)
    want = logits.copy()
    want[rows, entries] += bias
    np.testing.assert_array_equal(change("apply_logit_bias_inplace", rows, entries, bias), want)
    sequences, times = np.array([0, 1], np.int32), np.array([1, 2, 3], np.int32)
    penalties = np.array([[0.5, 0.25, 1.5], [0.125, 0.5, 2.0]], np.float32)
    value = want[rows, entries] - (penalties[rows, 0] + times * penalties[rows, 1])
    factor = penalties[rows, 2]
    want[rows, entries] = np.where(value < 0, value * factor, value / factor)
    got = change("apply_penalty_inplace", sequences, rows, entries, times, penalties)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    mask = np.full((2, -(-vocab // 32)), -1, np.int32)
    mask[1, 0] = ~(1 << 3)
    want[1, 3] = np.finfo(np.float32).min
    np.testing.assert_allclose(change("apply_bitmask_inplace", sequences, mask), want, rtol=1e-6)


def assert_drawn(weights: np.ndarray, u: float, token: int) -> None:
    """Check a draw up to the rounding of float32 sums."""
    sums = np.cumsum(weights) / weights.sum()
    assert weights[token] > 0
    assert sums[token] >= u - 1e-5
    assert sums[token] - weights[token] / weights.sum() <= u + 1e-5
