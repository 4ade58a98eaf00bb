"""Mixtures of experts on simulated GPUs: cases, and what NumPy makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.kernels import dense_gpu, experts_gpu
from fairy_compile.kernels.gpu import GpuKernel
from fairy_compile.models.linear import LinearCall
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.targets import Target
from tests.emulation.gpu_cases import call, compile_functions, tolerance
from tests.kernels.cases import make_parts

EPS = 2.0**-24  # half a unit in the last place of float32
# (experts, rows of x of each): one, 2, 17 and 64 rows; nobody, everybody, and all to one.
ROWS_OF = {
    "one": [0, 0, 1],
    "two": [1, 1, 0],
    "few": [5, 0, 12],
    "many": [9, 54, 1],
    "first": [64, 0, 0],
    "last": [0, 0, 64],
    "alone": [17],
}


def run_route(
    logits: np.ndarray, chosen: int, normalize: bool, target: Target, directory: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and ids of logits (n, experts)."""
    rows, experts = logits.shape
    batch = "single" if rows == 1 else "many"
    function = experts_gpu.build_route(experts, chosen, normalize, batch)
    library = compile_functions({"route": function}, target, directory)
    weights = np.full((rows, chosen), np.nan, np.float32)
    ids = np.full((rows, chosen), -1, np.int32)
    return tuple(call(library, "route", target, [logits, weights, ids])[1:])


def check_route(
    logits: np.ndarray, chosen: int, normalize: bool, target: Target, directory: Path
) -> None:
    """Compare with a softmax in float64, of finite logits.

    Differences of logits are rounded once, which counts e^(d EPS); exponentials of arguments x are
    good to 3 + 2 |x| units (the least that Vulkan asks); sums of n are off by n, and a division
    by 2.5 units.
    """
    weights, ids = run_route(logits, chosen, normalize, target, directory)
    exact = logits.astype(np.float64)
    exact = np.exp(exact - exact.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    want = np.argsort(-logits, axis=1, kind="stable")[:, :chosen]
    np.testing.assert_array_equal(ids, want)
    kept = np.take_along_axis(exact, want, axis=1)
    if normalize:
        kept /= kept.sum(axis=1, keepdims=True)
    spread = float(logits.max() - logits.min())
    units = spread + 2 * (3 + 2 * spread) + logits.shape[1] + chosen + 2 * 2.5
    np.testing.assert_allclose(weights, kept, rtol=2 * units * EPS)


def check_group(ids: np.ndarray, experts: int, target: Target, directory: Path) -> None:
    """Compare with a stable sort of ids (n, chosen)."""
    rows, chosen = ids.shape
    batch = "single" if rows == 1 else "many"
    function = experts_gpu.build_group(experts, chosen, batch)
    library = compile_functions({"group": function}, target, directory)
    empty = [np.full(shape, -1, np.int32) for shape in (experts + 1, rows * chosen, ids.shape)]
    _, starts, order, places = call(library, "group", target, [ids, *empty])
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(ids.ravel()), range(experts + 1)))
    np.testing.assert_array_equal(order, np.argsort(ids.ravel(), kind="stable"))
    np.testing.assert_array_equal(order[places.ravel()], np.arange(rows * chosen))


def grouped_error(
    kernel: GpuKernel,
    spec: PhaseSpec,
    rows_of: Sequence[int],
    target: Target,
    directory: Path,
    **knobs: Any,
) -> float:
    """Return the largest error of a grouped product in tolerances; NaN counts as infinite."""
    experts = len(rows_of)
    parts, packed = _make_experts(kernel, spec, experts)
    starts = np.concatenate([[0], np.cumsum(rows_of)]).astype(np.int32)
    x = np.random.default_rng(1).standard_normal((starts[-1], spec.in_features))
    x = x.astype(np.float32).astype(spec.dtype)
    y = np.full((len(x), spec.out_features), np.nan, spec.out_dtype)
    function = kernel.build_grouped(spec, experts, target, knobs)
    library = compile_functions({"grouped": function}, target, directory)
    got = call(library, "grouped", target, [x, starts, *packed, y])[-1]
    return max(
        _error(spec, parts[e], x[first:end], got[first:end])
        for e, (first, end) in enumerate(pairwise(starts))
        if end > first
    )


def chosen_error(
    kernel: GpuKernel,
    spec: PhaseSpec,
    ids: Sequence[int],
    experts: int,
    one_row: bool,
    target: Target,
    directory: Path,
) -> float:
    """Return the largest error of one token's products with the experts ``ids``."""
    parts, packed = _make_experts(kernel, spec, experts)
    rows = 1 if one_row else len(ids)
    x = np.random.default_rng(1).standard_normal((rows, spec.in_features))
    x = x.astype(np.float32).astype(spec.dtype)
    y = np.full((len(ids), spec.out_features), np.nan, spec.out_dtype)
    function = kernel.build_chosen(spec, experts, len(ids), rows, target, {})
    library = compile_functions({"chosen": function}, target, directory)
    arrays = [x, np.array([ids], np.int32), *packed, y]
    got = call(library, "chosen", target, arrays)[-1]
    rows_of_x = np.repeat(x, len(ids), axis=0) if one_row else x
    return max(
        _error(spec, parts[e], rows_of_x[i : i + 1], got[i : i + 1]) for i, e in enumerate(ids)
    )


def _make_experts(kernel: GpuKernel, spec: PhaseSpec, experts: int) -> tuple[list, list]:
    """Return the weights of every expert, and their packed arrays, stacked."""
    parts = [make_parts(spec, seed=10 + e) for e in range(experts)]
    packed = [kernel.layout.pack(own, spec) for own in parts]
    return parts, [np.stack([own[name] for own in packed]) for name in packed[0]]


def _error(spec: PhaseSpec, parts: list, x: np.ndarray, got: np.ndarray) -> float:
    want = phase_gemm_reference(x.astype(np.float32), parts)
    allowed = tolerance(spec, parts, x)
    if spec.out_dtype == "bfloat16":  # sums are float32; what is left is rounding them to 8 bits
        allowed = allowed + 2.0**-8 * np.abs(want)
    ratio = np.abs(got.astype(np.float64) - want) / allowed
    return float(np.nan_to_num(ratio, nan=np.inf).max())


def check_dense(
    sizes: tuple[int, int], dtype: str, rows_of: Sequence[int], target: Target, directory: Path
) -> None:
    """Compare dense experts of (out, in) features with NumPy, sorted rows and those of one token.

    Sums of K products in float32 err by K EPS of the sum of their magnitudes; outputs are rounded.
    """
    (out, inner), experts = sizes, len(rows_of)
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((experts, out, inner)).astype(dtype)
    starts = np.concatenate([[0], np.cumsum(rows_of)]).astype(np.int32)
    x = rng.standard_normal((starts[-1], inner)).astype(dtype)
    own = LinearCall(
        "experts", ("a",) * experts, inner, (out,), bias=False, reason="", dtype=dtype,
        act_dtype=dtype, out_dtype=dtype, experts=experts,
    )  # fmt: skip
    ids = [experts - 1, 0]
    functions = {
        "grouped": dense_gpu.build_grouped(own),
        "chosen": dense_gpu.build_chosen(own, len(ids), 1),
    }
    library = compile_functions(functions, target, directory)
    y = np.full((len(x), out), np.nan, dtype)
    got = call(library, "grouped", target, [x, starts, weight, y])[-1]
    for e, (first, end) in enumerate(pairwise(starts)):
        _check_products(got[first:end], x[first:end], weight[e])
    y, chosen = np.full((len(ids), out), np.nan, dtype), np.array([ids], np.int32)
    got = call(library, "chosen", target, [x[:1], chosen, weight, y])[-1]
    for i, e in enumerate(ids):
        _check_products(got[i : i + 1], x[:1], weight[e])


def _check_products(got: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    want, sums = x @ weight.T, np.abs(x) @ np.abs(weight).T
    rounding = 2.0**-11 if got.dtype == np.float16 else EPS
    allowed = x.shape[1] * 2 * EPS * sums + rounding * np.abs(want)
    assert (np.abs(got.astype(np.float64) - want) <= allowed).all()
