"""The CUDA kernels with bfloat16 activations on emulated tensor cores, against NumPy.

Activations are up to 1e30 here, of which float16 holds nothing beyond 65504.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_grid import Launch
from fairy_compile.kernels.cuda_hopper import CudaHopper
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.phase import PhaseTensor
from tests.emulation.cuda_rig import Emulator, missing_tools
from tests.emulation.test_cuda_emulated import ALL, QUICK, pick, tolerance
from tests.emulation.test_cuda_hopper_emulated import ALIGNED, JOINT, NARROW, is_joint
from tests.kernels.cases import make_parts, make_x

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

PLANES, HOPPER = CudaPlanes(), CudaHopper()
UNIT = 2.0**-8  # of rounding to bfloat16, whose numbers have 8 bits


def launches(spec: PhaseSpec, out_dtype: str = "bfloat16") -> list[Launch]:
    """Return the grids for any GPU, and the one for many rows on Hopper."""
    spec = replace(spec, dtype="bfloat16", out_dtype=out_dtype)
    return [*PLANES.launches(spec, "many", {}), HOPPER.launches(spec, "many", NARROW)[-1]]


def multiplied(parts: list[PhaseTensor], x: np.ndarray, joint: bool = False) -> np.ndarray:
    """Return the product, in float64, with the weights that operands of bfloat16 hold.

    Entries of the real matrix are rounded once for every stage, and once for every addition of
    stages, as the kernels do; with ``joint`` tables, only their sum.
    """
    outputs = []
    for part in parts:
        total = None
        stages = [part] if joint else map(partial(_stage, part), range(part.stages))
        for stage in stages:
            entries = stage.dequantize().astype(ml_dtypes.bfloat16)
            added = entries if total is None else total.astype(np.float32) + entries
            total = added.astype(ml_dtypes.bfloat16)
        outputs.append(x.astype(np.float64) @ total.astype(np.float64).T)
    return np.concatenate(outputs, axis=1)


def _stage(part: PhaseTensor, i: int) -> PhaseTensor:
    return replace(part, codes=part.codes[i : i + 1], scales=part.scales[i : i + 1])


def check(emulated: Emulator, spec: PhaseSpec, launch: Launch, x: np.ndarray, order=0) -> None:
    """Compare with the reference, and with the product that rounded weights give.

    The former is off by what rounding weights to 8 bits costs, 2^-8 of S as `tolerance` derives it
    for the 11 bits of float16; the latter is not, so that it tells which weight met which x. Both
    are rounded at the end where outputs are bfloat16.
    """
    parts, full = make_parts(spec), x.astype(np.float32)
    arrays = PLANES.layout.pack(parts, spec)
    got = emulated.run(launch, x, *arrays.values(), spec.out_features, order).astype(np.float64)
    assert np.isfinite(got).all()
    last = UNIT if emulated.out_dtype == "bfloat16" else 0.0
    decode = launch.function.startswith("decode")
    want = phase_gemm_reference(full, parts, spec.act if decode else "float")
    allowed = tolerance(spec, parts, full, prefill=not decode, unit=UNIT) + last * np.abs(want)
    assert np.max((np.abs(got - want)) / allowed) <= 1, launch.function
    if not decode:
        want = multiplied(parts, full, is_joint(launch))
        allowed = tolerance(spec, parts, full, prefill=True, unit=0.0) + last * np.abs(want)
        assert np.max((np.abs(got - want)) / allowed) <= 1, launch.function


def brain_x(spec: PhaseSpec, batch: int, largest: float = 1.0) -> np.ndarray:
    """Return random bfloat16 rows, the first of ordinary size, the last ``largest`` times that."""
    sizes = np.geomspace(1, largest, batch) if batch > 1 else np.array([largest])
    return (make_x(spec, batch) * sizes[:, None]).astype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Emulator:
    grids = [launch for spec in QUICK for launch in launches(spec)]
    return Emulator(grids, tmp_path_factory.mktemp("quick"), "bfloat16", "bfloat16")


@pytest.mark.parametrize("spec", QUICK, ids=PhaseSpec.describe)
def test_batches(quick, spec):
    *grids, wide = launches(spec)
    for batch in (1, 2, 17, 64):
        check(quick, spec, pick(grids, batch), brain_x(spec, batch))
    for batch in (1, 131):
        check(quick, spec, wide, brain_x(spec, batch))


def test_outputs_are_stored_together(tmp_path):
    """On Hopper, with joint tables and without."""
    for i, spec in enumerate((ALIGNED, JOINT[0])):
        wide = launches(spec)[-1]
        assert is_joint(wide) == (i == 1)
        folder = tmp_path / str(i)
        folder.mkdir()
        emulated = Emulator([wide], folder, "bfloat16", "bfloat16")
        for largest in (1, 1e30):
            check(emulated, spec, wide, brain_x(spec, 131, largest))


@pytest.mark.parametrize("largest", [1e5, 1e30])
def test_activations_beyond_float16(quick, largest):
    for spec in QUICK[:3]:
        *grids, wide = launches(spec)
        for batch in (1, 2, 17):
            check(quick, spec, pick(grids, batch), brain_x(spec, batch, largest))
        check(quick, spec, wide, brain_x(spec, 9, largest))


@pytest.mark.parametrize("order", [1, 2])
def test_threads_in_another_order(quick, order):
    for spec in QUICK[:2]:
        *grids, wide = launches(spec)
        for grid in (pick(grids, 17), wide):
            check(quick, spec, grid, brain_x(spec, 17), order)


def test_float32_outputs(tmp_path):
    """What a model's head asks for."""
    spec = QUICK[0]
    *grids, wide = launches(spec, "float32")
    emulated = Emulator([*grids, wide], tmp_path, "bfloat16", "float32")
    for batch in (1, 17):
        check(emulated, spec, pick(grids, batch), brain_x(spec, batch, 1e30))
    check(emulated, spec, wide, brain_x(spec, 9, 1e30))


@pytest.mark.slow
@pytest.mark.parametrize("spec", ALL, ids=PhaseSpec.describe)
def test_every_form(tmp_path: Path, spec: PhaseSpec):
    *grids, wide = launches(spec)
    emulated = Emulator([*grids, wide], tmp_path, "bfloat16", "bfloat16")
    for batch in (1, 2, 17, 64):
        check(emulated, spec, pick(grids, batch), brain_x(spec, batch, 1e30))
    check(emulated, spec, wide, brain_x(spec, 17, 1e30))
