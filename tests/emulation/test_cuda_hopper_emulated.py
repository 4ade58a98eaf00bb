"""The kernels for Hopper on emulated warpgroup tensor cores, against the NumPy reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fairy_compile.kernels.cuda_grid import Launch
from fairy_compile.kernels.cuda_hopper import CudaHopper
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from tests.emulation.cuda_rig import Emulator, missing_tools
from tests.emulation.test_cuda_emulated import ALL, LONG, QUICK, tolerance
from tests.kernels.cases import ONLY_W, make_parts, make_spec, make_x

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

KERNEL = CudaHopper()
NARROW = {"wide_tokens": 128, "wide_buffers": 3}
ALIGNED = make_spec((72, 40), 1160, act="int16")
"""Features of a part are a multiple of 8, so that 16 bytes of them are stored at once."""
JOINT = [
    make_spec((64, 24), 1160, act="int16"),
    make_spec((128, 9), 264, stages=4, terms=ONLY_W, act="int8"),
    make_spec((70,), 203, act="int16"),
]
"""A weight's codes are a byte, and all rows of a block have the same scales."""


def wide(spec: PhaseSpec, dtype: str, **knobs) -> Launch:
    launch = KERNEL.launches(replace(spec, dtype=dtype, out_dtype=dtype), "many", knobs)[-1]
    assert launch.arrange is not None
    return launch


def check(
    emulated: Emulator, launch: Launch, spec: PhaseSpec, x: np.ndarray, order=0, bias=None
) -> None:
    parts = make_parts(spec)
    arrays = KERNEL.layout.pack(parts, spec)
    got = emulated.run(launch, x, *arrays.values(), spec.out_features, order, bias)
    got = got.astype(np.float64)
    full = x.astype(np.float32)
    want = phase_gemm_reference(full, parts, "float")
    allowed = tolerance(spec, parts, full, prefill=True)
    if bias is not None:
        want = want + bias
        allowed = allowed + 2.0**-23 * (np.abs(want) + np.abs(bias))  # one more sum
    if x.dtype == np.float16:
        allowed = allowed + 2.0**-11 * np.abs(want)
    else:
        # x is rounded to float16, too: 2^-11 of S, as for an entry of the real matrix.
        allowed = allowed * (2 * spec.stages + 1) / (2 * spec.stages)
    worst = np.max(np.abs(got - want) - allowed)
    assert worst <= 0, f"off by {np.abs(got - want).max():.3g}, {worst:.3g} more than allowed"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Emulator:
    launches = [wide(spec, "float16", **NARROW) for spec in QUICK]
    return Emulator(launches, tmp_path_factory.mktemp("narrow"), "float16", "float16")


@pytest.mark.parametrize("spec", QUICK, ids=PhaseSpec.describe)
def test_rows_of_one_block_and_of_two(narrow, spec):
    for batch in (1, 128, 131):
        check(narrow, wide(spec, "float16", **NARROW), spec, make_x(spec, batch).astype(np.float16))


@pytest.mark.parametrize("spec", [*LONG, ALIGNED, JOINT[0]], ids=PhaseSpec.describe)
def test_columns_are_shared_by_blocks(tmp_path, spec):
    grids = KERNEL.launches(replace(spec, dtype="float16", out_dtype="float16"), "many", NARROW)
    shared = [g for g in grids if g.arrange and g.splits > 1]
    assert [(g.splits, g.most) for g in shared] == [(2, 128), (2, 256)]
    emulated = Emulator(shared[1:], tmp_path, "float16", "float16")
    for batch, order in ((5, 2), (140, 0)):
        check(emulated, shared[1], spec, make_x(spec, batch).astype(np.float16), order)


def test_biases(tmp_path):
    calls = ((QUICK[0], 1), (LONG[0], 2), (ALIGNED, 1), (ALIGNED, 2), (JOINT[0], 1), (JOINT[0], 2))
    for i, (spec, splits) in enumerate(calls):
        spec = replace(spec, dtype="float16", out_dtype="float16", bias=True)
        *_, shared, whole = KERNEL.launches(spec, "many", NARROW)
        launch = whole if splits == 1 else shared
        assert launch.splits == splits
        folder = tmp_path / str(i)
        folder.mkdir()
        bias = np.linspace(-30, 30, spec.out_features, dtype=np.float32)
        x = make_x(spec, 20).astype(np.float16)
        check(Emulator([launch], folder, "float16", "float16"), launch, spec, x, bias=bias)


def is_joint(launch: Launch) -> bool:
    return "kJoint = 1;" in launch.source


@pytest.mark.parametrize("tokens", [128, 256])
@pytest.mark.parametrize("spec", JOINT, ids=PhaseSpec.describe)
def test_joint_tables(tmp_path, spec, tokens):
    """With blocks of columns in buffers below and above them."""
    launch = wide(spec, "float16", wide_tokens=tokens)
    assert is_joint(launch)
    emulated = Emulator([launch], tmp_path, "float16", "float16")
    for batch, order in ((1, 0), (131, 2)):
        check(emulated, launch, spec, make_x(spec, batch).astype(np.float16), order)


def test_calls_without_joint_tables():
    others = {
        "scales of rows": make_spec((64,), 264, scale="row", act="int16"),
        "one stage": make_spec((64,), 264, stages=1, act="int16"),
        "three stages": make_spec((64,), 264, stages=3, act="int16"),
        "blocks with rows of two parts": make_spec((72, 56), 264, act="int16"),
    }
    for why, spec in others.items():
        assert not is_joint(wide(spec, "float16")), why


@pytest.mark.parametrize("tokens", [128, 256])
def test_outputs_are_stored_together(tmp_path, tokens):
    """By blocks that share columns, and store float, and by those that do not."""
    spec = replace(ALIGNED, dtype="float16", out_dtype="float16")
    grids = KERNEL.launches(spec, "many", {"wide_tokens": tokens})
    grids = {g.splits: g for g in grids if g.arrange and g.function.startswith("hopper")}
    assert set(grids) == {1, 2}
    emulated = Emulator(list(grids.values()), tmp_path, "float16", "float16")
    for launch in grids.values():
        assert "kAligned = 1" in launch.source
        check(emulated, launch, spec, make_x(spec, 137).astype(np.float16))


@pytest.mark.parametrize("order", [1, 2])
def test_threads_in_another_order(narrow, order):
    for spec in QUICK[:3]:
        x = make_x(spec, 9).astype(np.float16)
        check(narrow, wide(spec, "float16", **NARROW), spec, x, order)


def test_blocks_of_256_rows(tmp_path):
    """With more blocks of columns than buffers, and less than all of the last."""
    spec = make_spec(parts=(70,), m=264, act="int16")
    launch = wide(spec, "float16")
    emulated = Emulator([launch], tmp_path, "float16", "float16")
    check(emulated, launch, spec, make_x(spec, 150).astype(np.float16))


def test_float32_activations(tmp_path):
    spec = QUICK[0]
    launch = wide(spec, "float32", **NARROW)
    check(Emulator([launch], tmp_path, "float32", "float32"), launch, spec, make_x(spec, 5))


@pytest.mark.parametrize(
    ("removed", "kept"),
    [
        ("wait_barrier(&shared.full[turn.buffer], turn.parity);", ""),
        ("wait_barrier(&shared.empty[refilled.buffer], refilled.parity);", ""),
        ("wait_multiplications<3>();", "wait_multiplications<7>();"),
        ("wait_multiplications<0>();", ""),
        ("__syncthreads();  // everybody", "// everybody"),
        ("__syncthreads();\n      const int first", "const int first"),
        ("__syncthreads();\n    Sums sums;", "Sums sums;"),
    ],
    ids=[
        "x is there",
        "x is done with",
        "operands",
        "sums",
        "multiplied",
        "outputs",
        "joint tables",
    ],
)
def test_missing_synchronisation_is_noticed(tmp_path, removed, kept):
    # Scales for every tile, so that tables change, or joint ones that all threads fill; more blocks
    # of columns than buffers.
    scale = "tensor" if "Sums" in removed else "tile64"
    spec = make_spec(parts=(70,), m=264, scale=scale, act="int16")
    launch = wide(spec, "float16", **NARROW)
    assert removed in launch.source
    broken = replace(launch, source=launch.source.replace(removed, kept))
    x = make_x(spec, 128).astype(np.float16)
    check(Emulator([launch], tmp_path, "float16", "float16"), launch, spec, x)
    emulated = Emulator([broken], tmp_path, "float16", "float16")
    noticed = 0
    for order in range(6):
        try:
            check(emulated, broken, spec, x, order)
        except (AssertionError, RuntimeError):
            noticed += 1
    assert noticed


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL, ids=PhaseSpec.describe)
def test_every_form(tmp_path: Path, spec: PhaseSpec):
    launch = wide(spec, "float16")
    emulated = Emulator([launch], tmp_path, "float16", "float16")
    check(emulated, launch, spec, make_x(spec, 17).astype(np.float16))
