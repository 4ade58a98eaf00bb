"""One decode and one batch of every ARM instruction set under QEMU; `test_arm_emulated` has all."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels.arm import CODEBOOK_KERNELS
from fairy_compile.op import phase_gemm_reference
from tests.emulation import arm_rig
from tests.emulation.arm_cases import computed, tolerance
from tests.kernels.cases import make_parts, make_spec, make_x

missing = arm_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.mark.parametrize("machine", arm_rig.MACHINES, ids=lambda m: m.isa)
@pytest.mark.parametrize(
    ("stages", "batch", "act"),
    [(1, 1, "int8"), (2, 1, "int8"), (2, 9, "int8"), (2, 1, "int16"), (2, 9, "int16")],
)
def test_default_kernel_matches_reference(tmp_path, machine, stages, batch, act):
    spec, target = make_spec(stages=stages, act=act), machine.target()
    kernel = next(k for k in CODEBOOK_KERNELS if k.unsupported(spec, target) is None)
    function = kernel.build(spec, target, "single" if batch == 1 else "many", {})
    program = arm_rig.compile_kernel(function, target, tmp_path)
    parts, x = make_parts(spec), make_x(spec, batch)
    y = np.full((batch, spec.out_features), np.nan, np.float32)
    got = arm_rig.run(program, machine.cpu, [x, *kernel.layout.pack(parts, spec).values(), y])
    mode = kernel.table_mode(spec, {})
    parts = computed(parts, mode, kernel.isa.terms)
    want = phase_gemm_reference(x, parts, act)
    assert (np.abs(got - want) <= tolerance(spec, parts, x, mode)).all()
