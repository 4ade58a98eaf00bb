"""int8 activations a token on every ARM instruction set under QEMU."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels.arm import CODEBOOK_KERNELS
from fairy_compile.op import phase_gemm_reference
from fairy_compile.op.token_int8 import (
    guard_activations,
    guard_weight,
    guarded_columns,
    round_tokens,
)
from fairy_compile.phase import quantize_complex_layer
from tests.emulation import arm_rig
from tests.kernels.cases import ONLY_W, make_spec

missing = arm_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.mark.parametrize("machine", arm_rig.MACHINES, ids=lambda m: m.isa)
@pytest.mark.parametrize("rows", [1, 9])
def test_guarded_calls_compute_the_contract(tmp_path, machine, rows) -> None:
    m, target = 300, machine.target()
    spec = make_spec((70, 9), guarded_columns(m), 1, ONLY_W)
    kernel = next(k for k in CODEBOOK_KERNELS if k.unsupported(spec, target) is None)
    batch = "single" if rows == 1 else "many"
    function = kernel.build(spec, target, batch, {"tables": "split"})
    program = arm_rig.compile_kernel(function, target, tmp_path)
    rng = np.random.default_rng(rows)
    layers = [quantize_complex_layer(*rng.standard_normal((2, n, m))) for n in (70, 9)]
    x = rng.standard_normal((rows, 2 * m)).astype(np.float32)
    arrays = kernel.layout.pack([guard_weight(layer) for layer in layers], spec)
    y = np.full((rows, spec.out_features), np.nan, np.float32)
    seen = arm_rig.run(program, machine.cpu, [guard_activations(x), *arrays.values(), y])
    want = phase_gemm_reference(round_tokens(x), layers)
    assert np.linalg.norm(seen - want) <= 20 * 2**-24 * np.linalg.norm(want)
