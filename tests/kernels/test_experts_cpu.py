"""Routing, sorting and grouped products of mixtures of experts against NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tvm

from fairy_compile.compiler.plan import pick_kernel
from fairy_compile.kernels import dense, experts_cpu
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.phase import quantize
from fairy_compile.targets import load_target

EXPERTS, CHOSEN, IN, OUT = 5, 2, 64, 48


def compiled(function):
    """Return call(arrays), which returns all arrays as they are after the function."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    library = tvm.compile(module, target=load_target("cpu").to_tvm())

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        library["main"](*tensors)
        return [t.numpy() for t in tensors]

    return call


def run(function, *arrays: np.ndarray) -> list[np.ndarray]:
    return compiled(function)(*arrays)


def route(logits: np.ndarray, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    n = len(logits)
    batch = "single" if n == 1 else "many"
    function = experts_cpu.build_route(EXPERTS, CHOSEN, normalize, batch)
    empty = (np.zeros((n, CHOSEN), np.float32), np.full((n, CHOSEN), -1, np.int32))
    _, weights, ids = run(function, logits, *empty)
    return weights, ids


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("normalize", [False, True])
def test_tokens_go_to_the_likeliest_experts(rows: int, normalize: bool) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (rows, EXPERTS)).astype(np.float32)
    weights, ids = route(logits, normalize)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    want = np.argsort(-logits, axis=1)[:, :CHOSEN]
    np.testing.assert_array_equal(ids, want)
    kept = np.take_along_axis(exact, want, axis=1)
    if normalize:
        kept /= kept.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, kept, rtol=3e-6)


def test_ids_are_in_range_whatever_the_logits() -> None:
    logits = np.zeros((4, EXPERTS), np.float32)  # equal: the first come first
    logits[1], logits[2], logits[3, 3] = np.nan, -np.inf, np.inf
    _, ids = route(logits, normalize=True)
    assert ids[0].tolist() == [0, 1]
    assert ids.min() >= 0
    assert ids.max() < EXPERTS


@pytest.mark.parametrize("rows", [1, 40])
def test_pairs_are_sorted_by_expert(rows: int) -> None:
    ids = np.random.default_rng(1).integers(0, EXPERTS - 1, (rows, CHOSEN)).astype(np.int32)
    batch = "single" if rows == 1 else "many"
    empty = [np.full(n, -1, np.int32) for n in (EXPERTS + 1, rows * CHOSEN)]
    function = experts_cpu.build_group(EXPERTS, CHOSEN, batch)
    _, starts, order, places = run(function, ids, *empty, np.full_like(ids, -1))
    np.testing.assert_array_equal(starts, np.searchsorted(np.sort(ids.ravel()), range(EXPERTS + 1)))
    np.testing.assert_array_equal(order, np.argsort(ids.ravel(), kind="stable"))
    np.testing.assert_array_equal(order[places.ravel()], np.arange(rows * CHOSEN))


# No rows for some experts, one for others, and few and many: each takes another path.
STARTS = ([0, 0, 1, 1, 4, 4], [0, 1, 1, 14, 16, 40], [0, 0, 0, 0, 0, 2])
# Relative errors; see tests/models/test_parity.py: int8 errs by 2.6 % at most.
BOUNDS = {"float": 1e-6, "int8": 0.026}


@pytest.mark.parametrize("act", BOUNDS)
@pytest.mark.parametrize("few", [False, True])
def test_every_row_meets_its_expert(act: str, few: bool) -> None:
    target = load_target("cpu")
    asked = PhaseSpec((OUT // 4, OUT // 4), IN // 2, 2, ("U", "W"), "tensor", act)
    kernel, spec, _ = pick_kernel(asked, target)
    single, many = (kernel.build(spec, target, batch, {}) for batch in ("single", "many"))
    rng = np.random.default_rng(2)
    parts = [
        [quantize(rng.standard_normal((OUT // 2, IN)).astype(np.float32), 2) for _ in range(2)]
        for _ in range(EXPERTS)
    ]
    packed = [kernel.layout.pack(own, spec) for own in parts]
    weights = [np.concatenate([part.dequantize() for part in own]) for own in parts]
    check_grouped(single, many, packed, list(kernel.layout.arrays(spec)), weights, act, few)


@pytest.mark.parametrize("few", [False, True])
def test_dense_experts(few: bool) -> None:
    single, many = (dense.build_dense(OUT, IN, "float16", batch) for batch in ("single", "many"))
    weights = list(np.random.default_rng(3).standard_normal((EXPERTS, OUT, IN)).astype(np.float16))
    packed = [{"weight": weight} for weight in weights]
    check_grouped(single, many, packed, ["weight"], weights, "float", few)


def check_grouped(single, many, packed, names, weights, act: str, few: bool) -> None:
    starts_of = [s for s in STARTS if s[-1] == 2] if few else STARTS
    rows = 2 if few else None
    function = compiled(experts_cpu.build_grouped(EXPERTS, rows, single, many))
    arrays = [np.stack([own[name] for own in packed]) for name in names]
    for starts in starts_of:
        x = np.random.default_rng(4).standard_normal((starts[-1], IN)).astype(np.float32)
        index, empty = np.array(starts, np.int32), np.full((len(x), OUT), np.nan, np.float32)
        y = function(x, index, *arrays, empty)[-1]
        for e, (first, end) in enumerate(pairwise(starts)):
            if first == end:
                continue
            want = x[first:end].astype(np.float64) @ weights[e].astype(np.float64).T
            error = np.linalg.norm(y[first:end] - want) / np.linalg.norm(want)
            assert error <= BOUNDS[act], (starts, e)
