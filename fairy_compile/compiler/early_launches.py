"""Programmatic dependent launches: kernels start while those before them end.

On NVIDIA GPUs from Hopper on a kernel can be launched before the one before it is over, and waits
for it (``griddepcontrol.wait``) where it needs its results. A decode step is some hundred kernels
of a few microseconds, of which launching is a part worth hiding; phase kernels moreover have
weights to fetch that no other kernel computes.

Kernels of `kernels/cuda_source` that say so wait where that is best. All others wait before
anything else. So every kernel waits for the one before it, which had waited too.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call

from fairy_compile.kernels.cuda_source import WAIT_THEMSELVES

TAG = "tirx.use_programtic_dependent_launch"  # as TVM spells it
"""What asks TVM's runtime to launch a kernel early."""

_LAUNCH_PARAMS = "tirx.kernel_launch_params"
_CALL = "tirx.cuda.func_call"
_WAIT = """
__device__ __forceinline__ void fairy_wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
"""


def request_early_launches() -> Any:
    """Return a pass that asks for early launches of all kernels; it runs before kernels are split
    off. `wait_for_inputs` must follow."""

    @tirx.transform.prim_func_pass(opt_level=0, name="RequestEarlyLaunches")
    def run(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
        return func.with_attr(_LAUNCH_PARAMS, [TAG])

    return run


def wait_for_inputs() -> Any:
    """Return a pass that lets kernels wait for the one before, for device functions."""

    @tirx.transform.prim_func_pass(opt_level=0, name="WaitForInputs")
    def run(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
        if _has_own_wait(func):
            return func
        wait = cuda_func_call("fairy_wait_for_inputs", source_code=_WAIT)
        return func.with_body(tirx.SeqStmt([tirx.Evaluate(wait), func.body]))

    return run


def _has_own_wait(func: tirx.PrimFunc) -> bool:
    names = []

    def visit(call: Any, visitor: Any) -> None:
        if getattr(call.op, "name", "") == _CALL:
            names.append(call.args[0].value)
        visitor.default_visit(call)

    tvm_ffi.structural_visit(func.body, [(tvm.ir.Call, visit)])
    return any(name.startswith(WAIT_THEMSELVES) for name in names)
