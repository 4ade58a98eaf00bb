"""The activation contract and the reference operator."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fairy_compile.op import (
    dequantize_activations,
    phase_gemm_reference,
    quantize_activations,
)
from fairy_compile.phase import quantize


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_int8_activations_err_by_at_most_half_a_step(m: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 2 * m)).astype(np.float32)
    q, scale = quantize_activations(x)
    step = np.repeat(scale, 128, axis=-1)[..., :m].reshape(2, -1)
    error = np.abs(dequantize_activations(q, scale) - x)
    assert (error <= 0.5 * step * (1 + 1e-5)).all()
    assert np.abs(q.astype(int)).max() <= 127


def test_zero_group_has_scale_zero() -> None:
    q, scale = quantize_activations(np.zeros((1, 8), np.float32))
    assert not q.any()
    assert not scale.any()


def test_halves_and_groups_are_scaled_apart() -> None:
    x = np.zeros((1, 2 * 130), np.float32)
    x[0, 0], x[0, 129], x[0, 130] = 127.0, 12.7, 1.27
    _, scale = quantize_activations(x)
    np.testing.assert_allclose(scale[0], [[1.0, 0.1], [0.01, 0.0]], rtol=1e-6)


def test_reference_is_the_real_matrix_product_of_each_part() -> None:
    rng = np.random.default_rng(0)
    parts = [quantize(rng.standard_normal((2 * n, 6)), "w2") for n in (2, 5)]
    x = rng.standard_normal((3, 6)).astype(np.float32)
    want = np.concatenate([x @ p.dequantize().T for p in parts], axis=1)
    np.testing.assert_allclose(phase_gemm_reference(x, parts), want, rtol=1e-5, atol=1e-6)
