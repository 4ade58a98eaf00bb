"""Norms and gates on a simulated CUDA device against NumPy, as numbers and as integers."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.kernels.cuda import CudaPlanes, Norm
from fairy_compile.kernels.cuda_gate import build_gate_product
from fairy_compile.kernels.cuda_image import image_bytes, make_image
from fairy_compile.kernels.cuda_norm import build_rms_norm
from tests.emulation import cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_cases import call, compile_functions, host_target
from tests.kernels.cases import make_parts, make_spec

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

EPS = 1e-5
# Less than a warp, a block that is not full, rows that take threads several turns.
SIZES = {"float16": (64, 1000, 8200), "bfloat16": (64, 8200), "float32": (36, 4100)}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("dtype", list(SIZES))
def test_norms_equal_numpy(rig, tmp_path, dtype: str) -> None:
    """A sum of n squares errs by n eps, 2^-24 each; outputs round to ``dtype`` once."""
    rng, target = np.random.default_rng(0), host_target("cuda")
    functions = {
        f"norm_{size}_{batch}_{add}": build_rms_norm(size, EPS, dtype, batch, add=add)
        for size in SIZES[dtype]
        for batch in ("single", "many")
        for add in (False, True)
    }
    library = compile_functions(functions, target, tmp_path)
    for size in SIZES[dtype]:
        weight = rng.standard_normal(size).astype(np.float32)
        for batch, rows in (("single", 1), ("many", 3)):
            x, other = rng.standard_normal((2, rows, size)).astype(dtype)
            empty = np.full_like(x, np.nan)
            y = call(library, f"norm_{size}_{batch}_False", target, [x, weight, empty])[-1]
            check(y, x, weight)
            arrays = [x, other, weight, empty, empty]
            total, y = call(library, f"norm_{size}_{batch}_True", target, arrays)[-2:]
            np.testing.assert_array_equal(total, x + other)
            check(y, total, weight)


def check(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    exact = x.astype(np.float64)
    want = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + EPS) * weight
    rounding = float(ml_dtypes.finfo(y.dtype).eps) / 2
    allowed = (rounding + (x.shape[1] / 2 + 8) * 2.0**-24) * np.abs(want) + float(
        ml_dtypes.finfo(y.dtype).tiny
    )
    assert np.all(np.abs(y - want) <= allowed)


@pytest.mark.parametrize("dtype", list(SIZES))
@pytest.mark.parametrize("act", ["int16", "int8"])
def test_norms_write_images_of_what_they_would_write(rig, tmp_path, dtype: str, act: str) -> None:
    rng, target = np.random.default_rng(0), host_target("cuda")
    sizes = (256, 2048 + 256)
    functions = {
        f"norm_{size}_{add}_{own or 'plain'}": build_rms_norm(
            size, EPS, dtype, "single", add=add, act=own
        )
        for size in sizes
        for add in (False, True)
        for own in (None, act)
    }
    library = compile_functions(functions, target, tmp_path)
    for size in sizes:
        weight = rng.standard_normal(size).astype(np.float32)
        x, other = rng.standard_normal((2, 1, size)).astype(dtype)
        x[0, :128] = 0  # a group of zeros has scale 0
        empty, image = np.full_like(x, np.nan), empty_image(size, act)
        for add in (False, True):
            given = [x, other, weight, empty] if add else [x, weight]
            y = call(library, f"norm_{size}_{add}_plain", target, [*given, empty])[-1]
            *_, total, got = call(library, f"norm_{size}_{add}_{act}", target, [*given, image])
            check_image(got, y, act)
            if add:
                np.testing.assert_array_equal(total, x + other)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", list(SIZES))
def test_gates_equal_numpy_and_write_images(rig, tmp_path, dtype: str, activation: str) -> None:
    """An exponential is off by 2 units, its argument by 5; a quotient and a product round once."""
    rng, target = np.random.default_rng(1), host_target("cuda")
    size = 1280  # blocks that are not full
    functions = {
        str(act): build_gate_product(activation, size, dtype, act)
        for act in (None, "int16", "int8")
    }
    library = compile_functions(functions, target, tmp_path)
    x = (3 * rng.standard_normal((1, 2 * size))).astype(dtype)
    x[0, :2] = 30, -30
    y = call(library, "None", target, [x, np.full((1, size), np.nan, dtype)])[-1]
    gate, up = x.astype(np.float64)[:, :size], x.astype(np.float64)[:, size:]
    argument = gate
    if activation == "gelu_tanh":
        argument = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    with np.errstate(over="ignore"):
        want = gate / (1 + np.exp(-argument)) * up
    # An error of the argument is one of the exponential, relative to its size.
    single = (6 + 5 * np.abs(argument)) * 2.0**-24
    kind = ml_dtypes.finfo(y.dtype)
    allowed = (float(kind.eps) / 2 + single) * np.abs(want) + float(kind.tiny)
    assert np.all(np.abs(y - want) <= allowed)
    for act in ("int16", "int8"):
        check_image(call(library, act, target, [x, empty_image(size, act)])[-1], y, act)


def empty_image(size: int, act: str) -> np.ndarray:
    return np.full((1, image_bytes(size // 2, act)), 255, np.uint8)


def check_image(got: np.ndarray, y: np.ndarray, act: str) -> None:
    want = make_image(y, act)
    groups = y.shape[1] // 256
    records = [image.reshape(groups, -1)[:, :-8] for image in (got, want)]
    np.testing.assert_array_equal(*records)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("act", ["int16", "int8"])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_normalise_rows_as_norms_before_them_do(
    rig, tmp_path, dtype: str, act: str, bias: bool
) -> None:
    """Squares of eighths add up exactly in any order, so that every bit is the same.

    21 groups of columns: some warps have one of them more than others.
    """
    kernel, rng, target = CudaPlanes(), np.random.default_rng(0), host_target("cuda")
    spec = make_spec((37, 16), 21 * 128, act=act)
    spec = replace(spec, dtype=dtype, out_dtype=dtype, bias=bias)
    size = spec.in_features
    assert kernel.normalises(spec)
    functions = {"layer": kernel.build_from_image(spec, {})}
    for add in (False, True):
        functions[f"norm_{add}"] = build_rms_norm(size, EPS, dtype, "single", add=add, act=act)
        functions[f"both_{add}"] = kernel.build_normed(spec, {}, Norm(EPS, add))
    library = compile_functions(functions, target, tmp_path)
    weights = list(kernel.layout.pack(make_parts(spec), spec).values())
    if bias:
        weights.append(rng.standard_normal(spec.out_features).astype(np.float32))
    weight = rng.standard_normal(size).astype(np.float32)
    x, other = (rng.integers(-16, 17, (2, 1, size)) / 8).astype(dtype)
    empty, y = np.full_like(x, np.nan), np.full((1, spec.out_features), np.nan, dtype)
    for add in (False, True):
        given, sums = ([x, other], [empty]) if add else ([x], [])
        arrays = [*given, weight, *sums, empty_image(size, act)]
        image = call(library, f"norm_{add}", target, arrays)[-1]
        want = call(library, "layer", target, [image, *weights, y])[-1]
        *_, total, got = call(library, f"both_{add}", target, [*given, weight, *weights, *sums, y])
        np.testing.assert_array_equal(got, want)
        assert np.abs(want.astype(np.float32)).max() > 0
        if add:
            np.testing.assert_array_equal(total, x + other)
