"""Routing, sorting and products of mixtures of experts on simulated GPUs, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fairy_compile.kernels import FAMILIES, experts_gpu
from tests.emulation import (
    experts_cases,
)
from tests.emulation.experts_cases import ROWS_OF, check_dense, check_group, check_route
from tests.emulation.gpu_cases import SHAPES, TILED, compile_functions, gpu_spec, host_target
from tests.emulation.rigs import RIGS

slow = pytest.mark.slow


# All cases run on the device that checks most, where they are quick; some of them on the others.
DEVICES = [pytest.param(kind, marks=() if kind == "metal" else slow) for kind in RIGS]


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("rows", "experts", "chosen"), [(1, 8, 2), (13, 5, 2), (1, 128, 8), (3, 300, 4), (2, 1, 1)]
)
def test_tokens_go_to_the_likeliest_experts(rig_of, tmp_path, kind, rows, experts, chosen) -> None:
    rig_of(kind)
    logits = np.random.default_rng(0).normal(0, 3, (rows, experts)).astype(np.float32)
    for normalize in (False, True):
        check_route(logits, chosen, normalize, host_target(kind), tmp_path)


@pytest.mark.parametrize("kind", DEVICES)
def test_of_equal_experts_the_first_come_first(rig_of, tmp_path: Path, kind: str) -> None:
    rig_of(kind)
    ties = np.array([[0] * 6, [1, 2, 2, 1, 2, 0], [-1, -3, -1, -3, -1, -1]], np.float32)
    ties[0, ::2] = -0.0  # equal to 0
    for chosen in (2, 6):
        check_route(ties, chosen, True, host_target(kind), tmp_path)


@pytest.mark.parametrize("kind", DEVICES)
def test_ids_are_in_range_whatever_the_logits(rig_of, tmp_path: Path, kind: str) -> None:
    rig_of(kind)
    logits = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    logits[0], logits[1], logits[2, 3] = np.nan, -np.inf, np.inf
    logits[3, 1], logits[4, :3] = np.nan, -np.float32(np.nan)
    weights, ids = experts_cases.run_route(logits, 3, True, host_target(kind), tmp_path)
    assert ids.min() >= 0
    assert ids.max() < 5
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert np.isfinite(weights[5]).all()


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("rows", "experts", "chosen"), [(1, 8, 2), (40, 5, 2), (301, 7, 3), (9, 1, 1), (4, 128, 8)]
)
def test_pairs_are_sorted_by_expert(rig_of, tmp_path, kind, rows, experts, chosen) -> None:
    rig_of(kind)
    rng = np.random.default_rng(1)
    used = rng.permutation(experts)[: max(1, experts - 2)]  # nobody goes to some
    ids = rng.choice(used, (rows, chosen)).astype(np.int32)
    check_group(ids, experts, host_target(kind), tmp_path)
    check_group(np.full_like(ids, experts - 1), experts, host_target(kind), tmp_path)


# Few rows take the kernel of decode, many that of prefill.
QUICK = [
    *(("metal", SHAPES[0], "float32", name) for name in ("one", "few", "many")),
    ("metal", SHAPES[0], "float16", "many"),
]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else slow)
    for case in (
        (kind, shape, dtype, name)
        for kind in RIGS
        for shape in SHAPES
        for dtype in ("float32", "float16", "bfloat16")
        for name in ROWS_OF
        if kind == "metal" or (shape in SHAPES[:3] and dtype == "float32")
    )
]


@pytest.mark.parametrize(("kind", "shape", "dtype", "rows"), CASES)
def test_every_row_meets_its_expert(rig_of, tmp_path, kind, shape, dtype: str, rows: str) -> None:
    rig_of(kind)
    (kernel,), spec = FAMILIES[f"{kind}.words"], gpu_spec(shape, dtype)
    knobs = {} if rows == "first" else {"switch": 8 if sum(ROWS_OF[rows]) <= 17 else 4}
    target = host_target(kind)
    error = experts_cases.grouped_error(kernel, spec, ROWS_OF[rows], target, tmp_path, **knobs)
    assert error <= 1


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("switch", [0, 32])
def test_both_kernels_serve_any_number_of_rows(rig_of, tmp_path, kind: str, switch: int) -> None:
    rig_of(kind)
    (kernel,), spec = FAMILIES[f"{kind}.words"], gpu_spec(SHAPES[0], "float32")
    target = host_target(kind)
    for name in ("one", "few", "many"):
        rows_of = ROWS_OF[name]
        knobs = {"switch": switch}
        error = experts_cases.grouped_error(kernel, spec, rows_of, target, tmp_path, **knobs)
        assert error <= 1, name


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("switch", [0, 8])
def test_a_hundred_experts(rig_of, tmp_path: Path, kind: str, switch: int) -> None:
    rig_of(kind)
    (kernel,), spec = FAMILIES[f"{kind}.words"], gpu_spec(SHAPES[5], "float32")
    rows_of = np.random.default_rng(6).choice([0, 0, 0, 1, 2, 5], 128).tolist()
    assert sum(rows_of) > 64
    target, knobs = host_target(kind), {"switch": switch}
    assert experts_cases.grouped_error(kernel, spec, rows_of, target, tmp_path, **knobs) <= 1


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], *(pytest.param(s, marks=slow) for s in SHAPES[1:])])
def test_one_token_meets_its_experts(rig_of, tmp_path, kind, one_row: bool, shape) -> None:
    rig_of(kind)
    (kernel,), spec = FAMILIES[f"{kind}.words"], gpu_spec(shape, "float32")
    for ids in ([3, 0], [2]):
        error = experts_cases.chosen_error(
            kernel, spec, ids, 4, one_row, host_target(kind), tmp_path
        )
        assert error <= 1


@pytest.mark.parametrize("kind", DEVICES)
def test_tables_of_tiles_are_those_of_the_expert(rig_of, tmp_path: Path, kind: str) -> None:
    rig_of(kind)
    (kernel,), spec = FAMILIES[f"{kind}.words"], gpu_spec(TILED[0], "float32")
    target = host_target(kind)
    error = experts_cases.grouped_error(kernel, spec, ROWS_OF["few"], target, tmp_path)
    assert error <= 1
    assert experts_cases.chosen_error(kernel, spec, [3, 0], 4, False, target, tmp_path) <= 1


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dense_experts(rig_of, tmp_path: Path, kind: str, dtype: str) -> None:
    if (kind, dtype) == ("opencl", "float16"):
        pytest.skip("PoCL has no float16")
    rig_of(kind)
    for name in ("two", "few", "many"):
        for sizes in ((70, 72), (9, 33)):
            check_dense(sizes, dtype, ROWS_OF[name], host_target(kind), tmp_path)


def test_registers_stay_registers(rig_of, tmp_path: Path) -> None:
    """TVM may move what threads keep to memory of the device, which thread groups then share."""
    rig, target = rig_of("metal"), host_target("metal")
    (kernel,), spec = FAMILIES["metal.words"], gpu_spec(SHAPES[0], "float32")
    functions = {
        "route_single": experts_gpu.build_route(128, 8, True, "single"),
        "route": experts_gpu.build_route(128, 8, True, "many"),
        "group_single": experts_gpu.build_group(128, 8, "single"),
        "group": experts_gpu.build_group(128, 8, "many"),
        "grouped": kernel.build_grouped(spec, 128, target, {}),
        "chosen": kernel.build_chosen(spec, 128, 8, 1, target, {}),
    }
    for name, function in functions.items():
        compile_functions({name: function}, target, tmp_path)
        for launched in rig.kernels:
            buffers = sum(map(launched.is_buffer, range(len(launched.arguments))))
            assert 0 < buffers <= len(function.params), name
