"""The generic kernel against the NumPy reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tvm

from fairy_compile.kernels.generic import GenericKernel
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.phase import PhaseTensor, tile_shape
from fairy_compile.targets import load_target

KERNEL = GenericKernel()
UW = ("U", "W")


def random_part(n: int, m: int, stages: int, terms, scale: str, seed: int = 0) -> PhaseTensor:
    rng = np.random.default_rng([n, m, stages, seed])
    tile = tile_shape(scale, n, m)
    tiles = (-(-n // tile[0]), -(-m // tile[1]))
    codes = rng.integers(0, 4, (stages, len(terms), n, m), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (stages, len(terms), 2, *tiles)).astype(np.float32)
    return PhaseTensor.from_codes(codes, scales, terms, scale)


@cache
def compiled(spec: PhaseSpec, batch: str):
    func = KERNEL.build(spec, load_target("cpu"), batch, {}).with_attr("global_symbol", "main")
    return tvm.compile(func, target=load_target("cpu").to_tvm())["main"]


def run(spec: PhaseSpec, parts: list[PhaseTensor], x: np.ndarray) -> np.ndarray:
    arrays = KERNEL.layout.pack(parts, spec)
    y = tvm.runtime.tensor(np.full((len(x), spec.out_features), np.nan, np.float32))
    function = compiled(spec, "single" if len(x) == 1 else "many")
    function(tvm.runtime.tensor(x), *(tvm.runtime.tensor(a) for a in arrays.values()), y)
    return y.numpy()


def check(spec: PhaseSpec, parts: list[PhaseTensor], x: np.ndarray) -> None:
    """Compare with the reference.

    A float32 sum of K products in any order errs by at most K eps sum |x a|. An entry a of A is a
    sum of T * terms scales with signs, so it can be small and still carry the rounding of large
    ones: |a| is bounded by the sum of the largest scales instead.
    """
    want = phase_gemm_reference(x, parts)
    largest = max(float(p.scales.max(axis=(2, 3, 4)).sum()) for p in parts)
    k = spec.in_features + 2 * spec.stages * len(spec.terms)
    bound = k * np.finfo(np.float32).eps * largest * np.abs(x).sum(axis=1, keepdims=True)
    assert (np.abs(run(spec, parts, x) - want) <= bound).all()


@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize(
    ("parts", "m", "stages", "terms", "scale"),
    [
        ((5,), 3, 1, UW, "tensor"),
        ((1,), 1, 2, UW, "row"),
        ((5, 3, 2), 7, 2, UW, "tensor"),
        ((64, 128), 130, 2, UW, "tile64"),
        ((100, 65), 130, 3, UW, "tile64"),
        ((17,), 64, 4, UW, "tensor"),
        ((9,), 33, 1, ("W",), "tensor"),
        ((12, 4), 65, 2, ("W",), "row"),
    ],
)
def test_matches_the_reference(batch: int, parts, m: int, stages: int, terms, scale: str) -> None:
    spec = PhaseSpec(parts, m, stages, terms, scale, "float")
    tensors = [random_part(n, m, stages, terms, scale, i) for i, n in enumerate(parts)]
    x = np.random.default_rng(batch).standard_normal((batch, 2 * m)).astype(np.float32)
    check(spec, tensors, x)


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_extreme_codes(code: int) -> None:
    spec = PhaseSpec((6,), 20, 2, UW, "tensor", "float")
    codes = np.full((2, 2, 6, 20), code, np.uint8)
    scales = np.array([0.5, 0.25, 1e-6, 2.0], np.float32)
    scales = np.broadcast_to(scales.reshape(2, 1, 2, 1, 1), (2, 2, 2, 1, 1)).copy()
    x = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    check(spec, [PhaseTensor.from_codes(codes, scales, UW, "tensor")], x)


def test_padding_columns_never_touch_memory_behind_the_scales() -> None:
    """x is 0 there, but 0 * NaN is NaN: whatever follows the array must not be read."""
    spec = PhaseSpec((8,), 5, 2, UW, "tensor", "float")
    part = random_part(8, 5, 2, UW, "tensor")
    arrays = KERNEL.layout.pack([part], spec)
    size = arrays["scales"].size
    guarded = np.full(size + 4096, np.nan, np.float32)
    guarded[:size] = arrays["scales"].ravel()
    scales = tvm.runtime.from_dlpack(_aligned(guarded)[:size].reshape(arrays["scales"].shape))
    x = np.ones((1, 10), np.float32)
    y = tvm.runtime.tensor(np.zeros((1, 16), np.float32))
    codes = tvm.runtime.tensor(arrays["codes"])
    compiled(spec, "single")(tvm.runtime.tensor(x), codes, scales, y)
    np.testing.assert_allclose(y.numpy(), phase_gemm_reference(x, [part]), rtol=1e-5, atol=1e-6)


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy whose data is aligned to 64 bytes, as compiled functions expect."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + array.nbytes].view(array.dtype)
    out[:] = array
    return out


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("parts", [(70,), (64, 128), (65, 3, 1)])
def test_layout_round_trip_is_exact(parts, scale: str) -> None:
    spec = PhaseSpec(parts, 130, 3, UW, scale, "float")
    tensors = [random_part(n, 130, 3, UW, scale, i) for i, n in enumerate(parts)]
    arrays = KERNEL.layout.pack(tensors, spec)
    for name, array in KERNEL.layout.arrays(spec).items():
        assert (arrays[name].shape, arrays[name].dtype) == (array.shape, array.dtype)
    for part, back in zip(tensors, KERNEL.layout.unpack(arrays, spec), strict=True):
        np.testing.assert_array_equal(back.codes, part.codes)
        np.testing.assert_array_equal(back.scales, part.scales)


def test_refuses_int8_activations_in_words() -> None:
    spec = PhaseSpec((8,), 8, 2, UW, "tensor", "int8")
    assert "int8" in KERNEL.unsupported(spec, load_target("cpu"))
