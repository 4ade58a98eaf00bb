"""The activation contract and the reference operator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairy_compile.op import (
    dequantize_activations,
    phase_gemm_reference,
    quantize_activations,
)
from fairy_compile.phase import quantize


@pytest.mark.parametrize(("act", "levels"), [("int8", 127), ("int16", 32639)])
@given(m=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_activations_err_by_at_most_half_a_step(act, levels: int, m: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((2, 2 * m)).astype(np.float32)
    q, scale = quantize_activations(x, act=act)
    step = np.repeat(scale, 128, axis=-1)[..., :m].reshape(2, -1)
    error = np.abs(dequantize_activations(q, scale) - x)
    # The products x * (levels / peak) and q * scale are rounded to float32: up to 3 ulp of levels.
    assert (error <= (0.5 + 3 * levels * 2.0**-24) * step).all()
    assert np.abs(q.astype(int)).max() == levels
    assert q.dtype == act


def test_int16_levels_are_two_signed_bytes() -> None:
    q = np.arange(-32639, 32640)
    high = (q + 128) >> 8
    low = q - 256 * high
    assert (high.min(), high.max(), low.min(), low.max()) == (-127, 127, -128, 127)


def test_int16_products_err_by_less_than_the_stated_bound() -> None:
    rng = np.random.default_rng(0)
    parts = [quantize(rng.standard_normal((64, 512)), "w2")]
    x = rng.standard_normal((8, 512)).astype(np.float32)
    exact = phase_gemm_reference(x, parts)
    for act, allowed in (("int8", 2.6e-2), ("int16", 1.0e-4)):
        error = np.linalg.norm(phase_gemm_reference(x, parts, act) - exact)
        assert 0 < error <= allowed * np.linalg.norm(exact)


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
