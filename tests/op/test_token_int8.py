"""iFairy's activation contract, and how kernels with groups of 128 reproduce it."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.op import phase_gemm_reference
from fairy_compile.op.token_int8 import (
    guard_activations,
    guard_weight,
    guarded_columns,
    guarded_places,
    round_tokens,
)
from fairy_compile.phase import quantize_complex_layer

COLUMNS = [1, 5, 126, 127, 252, 300, 1536]


def activations(m: int, tokens: int = 5) -> np.ndarray:
    rng = np.random.default_rng(m)
    sizes = 10 ** rng.uniform(-4, 3, (tokens, 1))
    return (sizes * rng.standard_normal((tokens, 2 * m))).astype(np.float32)


def test_rounding_of_known_values() -> None:
    # Peaks 127 and 254: steps of 1 and 2; 2.5 and 3 of them go to even.
    x = np.array([[127, 2.5, -3.5, 254, 5, -1]], np.float32)
    np.testing.assert_array_equal(round_tokens(x), [[127, 2, -4, 254, 4, 0]])
    # Below 1e-5 a peak counts as 1e-5.
    tiny = np.array([[1e-8, 4e-8, 0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(round_tokens(tiny), [[0, 1e-5 / 127, 0, 0, 0, 0]][:1], atol=8e-8)
    assert not round_tokens(np.zeros((2, 6), np.float32)).any()


@pytest.mark.parametrize("m", COLUMNS)
def test_guards_stand_first_in_groups_of_128(m: int) -> None:
    places, columns = guarded_places(m), guarded_columns(m)
    guards = sorted(set(range(columns)) - set(places.tolist()))
    assert len(places) == len(set(places.tolist())) == m
    assert guards == [g + i for g in range(0, columns, 128) for i in (0, 1)]


@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("m", COLUMNS)
def test_a_guarded_call_in_groups_computes_the_contract(m: int, scale: str) -> None:
    rng = np.random.default_rng(m)
    re, im = rng.standard_normal((2, 24, m))
    layer = quantize_complex_layer(re, im, scale=scale)
    x = activations(m)
    want = phase_gemm_reference(round_tokens(x), [layer])
    seen = phase_gemm_reference(guard_activations(x), [guard_weight(layer)], act="int8")
    # The same integers; scales differ by some roundings of float32.
    assert np.linalg.norm(seen - want) <= 4 * 2**-23 * np.linalg.norm(want)
    # Rounding in groups alone is another contract.
    if m > 128:
        other = phase_gemm_reference(round_tokens(x), [layer], act="int8")
        assert np.linalg.norm(other - want) > 1e-4 * np.linalg.norm(want)


def test_scale_tiles_are_refused() -> None:
    layer = quantize_complex_layer(np.ones((64, 130)), np.ones((64, 130)), scale="tile64")
    with pytest.raises(ValueError, match="tiles"):
        guard_weight(layer)
