"""Compiling and running single functions on a simulated GPU, and what phase kernels must give."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  bfloat16 for NumPy
import numpy as np
import tvm

from fairy_compile.compiler.device_pipeline import tir_pipeline
from fairy_compile.kernels.base import PhaseKernel
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.phase import PhaseTensor
from fairy_compile.targets import Target, load_target
from tests.kernels.cases import make_parts, make_spec, make_x

_NUMBERS = itertools.count()
BOTH, ONLY_W = ("U", "W"), ("W",)
# (parts, m, stages, terms, scale): odd sizes, fused parts, every T and granularity.
SHAPES = [
    ((70, 9), 200, 2, BOTH, "tensor"),
    ((33,), 64, 1, BOTH, "row"),
    ((64, 70), 130, 2, BOTH, "tile64"),
    ((17,), 48, 3, BOTH, "tensor"),
    ((40,), 33, 4, BOTH, "row"),
    ((9, 3), 65, 1, ONLY_W, "tensor"),
    ((66,), 128, 2, ONLY_W, "tile64"),
    ((5,), 7, 3, ONLY_W, "row"),
]
# Scales a tile: several tables at a time and several times, columns that fill no tile and no unit,
# every T, rows of parts that fill no thread group, and rows that no table serves.
TILED = [
    ((64, 192), 2600, 2, BOTH, "tile64"),
    ((128,), 130, 2, BOTH, "tile64"),
    ((96,), 200, 1, BOTH, "tile64"),
    ((64,), 1100, 4, BOTH, "tile64"),
    ((130,), 1040, 3, BOTH, "tile64"),
    ((72, 8), 320, 2, ONLY_W, "tile64"),
    ((256,), 64, 1, ONLY_W, "tile64"),
    ((33,), 65, 2, BOTH, "tile64"),
]


def host_target(name: str) -> Target:
    """Return a GPU target with this machine as its host."""
    target = load_target(name)
    return replace(target, tvm=target.tvm | {"host": {"kind": "llvm"}}, library="so", linkers=())


def compile_functions(functions: Mapping[str, Any], target: Target, directory: Path) -> Any:
    """Return a loaded library of scheduled functions."""
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    path = directory / f"{next(_NUMBERS)}.so"  # the loader remembers libraries by path
    options = {"target": target.to_tvm(), "pipeline": tir_pipeline(target)}
    tvm.tirx.build(tvm.IRModule(named), **options).export_library(str(path))
    return tvm.runtime.load_module(str(path))


def call(
    library: Any,
    name: str,
    target: Target,
    arrays: Sequence[np.ndarray],
    scalars: Sequence[int | float] = (),
) -> list[Any]:
    """Call a function on copies of ``arrays`` on the device, and return all of them after it.

    ``scalars`` follow the arrays.
    """
    device = tvm.runtime.device(target.device)
    tensors = [tvm.runtime.tensor(array, device) for array in arrays]
    library[name](*tensors, *scalars)
    return [tensor.numpy() for tensor in tensors]


def gpu_spec(shape: tuple, dtype: str) -> PhaseSpec:
    """Return the spec of one of `SHAPES`."""
    parts, m, stages, terms, scale = shape
    spec = make_spec(parts, m, stages, terms, scale, act="float")
    return replace(spec, dtype=dtype, out_dtype=dtype)


def run_phase_kernel(
    kernel: PhaseKernel,
    spec: PhaseSpec,
    target: Target,
    batch: int,
    directory: Path,
    knobs: Mapping[str, Any] | None = None,
    code: int | None = None,
    size: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, list[PhaseTensor], np.ndarray]:
    """Run one call; return what it gave, the reference, the weights and x.

    ``code`` is that of all weights, ``size`` a factor on x.
    """
    assert kernel.unsupported(spec, target) is None
    function = kernel.build(spec, target, "single" if batch == 1 else "many", knobs or {})
    library = compile_functions({"phase_gemm": function}, target, directory)
    parts = make_parts(spec, code=code)
    x = (make_x(spec, batch) * np.float32(size)).astype(spec.dtype)
    y = np.full((batch, spec.out_features), np.nan, spec.out_dtype)
    arrays = [x, *kernel.layout.pack(parts, spec).values(), y]
    got = call(library, "phase_gemm", target, arrays)[-1]
    return got, phase_gemm_reference(x.astype(np.float32), parts), parts, x


def largest_error(
    kernel: PhaseKernel, spec: PhaseSpec, target: Target, *call: Any, **options: Any
) -> float:
    """Return the largest error of a call in tolerances; NaN counts as infinite.

    Further arguments are those of `run_phase_kernel`.
    """
    got, want, parts, x = run_phase_kernel(kernel, spec, target, *call, **options)
    allowed = tolerance(spec, parts, x)
    if spec.out_dtype == "bfloat16":  # sums are float32; what is left is rounding them to 8 bits
        allowed = allowed + 2.0**-8 * np.abs(want)
    ratio = np.abs(got.astype(np.float64) - want) / allowed
    return float(np.nan_to_num(ratio, nan=np.inf).max())


def tolerance(spec: PhaseSpec, parts: Sequence[PhaseTensor], x: np.ndarray) -> np.ndarray:
    """Return how far each row's outputs may be off.

    A float32 sum of K products in any order errs by at most K eps sum |x a|, see test_generic.
    Weights rounded to float16 (tiled kernels) err by 2^-11 of the largest and so do outputs.
    """
    largest = max(float(p.scales.max(axis=(2, 3, 4)).sum()) for p in parts)
    sums = np.abs(x.astype(np.float64)).sum(axis=1, keepdims=True)
    steps = (spec.in_features + 2 * spec.stages * len(spec.terms)) * np.finfo(np.float32).eps
    if spec.dtype == "float16":
        # Rounded weights are as often too large as too small: 6 deviations of independent ones.
        deviation = np.sqrt((x.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        return largest * (steps * sums + 2**-11 * (6 * deviation + 6 * deviation))
    return largest * steps * sums
