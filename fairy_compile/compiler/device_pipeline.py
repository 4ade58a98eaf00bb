"""What is done to device code before and after TVM's own lowering.

TVM reduces across threads by register shuffles and then lets every thread read the lane that has
the sum, numbered within the whole thread group. CUDA takes that number modulo the width of its
instruction; Metal has no width, and lanes beyond the simdgroup are undefined there.

Devices other than CUDA's have bfloat16 in memory alone, see `compiler.bfloat16`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx import compilation_pipeline

from fairy_compile.compiler.bfloat16 import widen_bound_values
from fairy_compile.compiler.early_launches import request_early_launches, wait_for_inputs
from fairy_compile.targets import Target

METAL_PIPELINE = "fairy_metal"
GPU_PIPELINE = "fairy_gpu"
EARLY_PIPELINE = "fairy_cuda_early"
_LANE = 2  # the argument of a shuffle that names a lane


def pass_context(
    target: Target, *, own_kernels: bool = True, config: Mapping[str, Any] | None = None
) -> tvm.transform.PassContext:
    """Return the context in which functions for a target are lowered.

    Args:
        target: what is compiled for.
        own_kernels: all functions that reduce are kernels of ours.
        config: TVM's options.
    """
    # Kernels for CPUs allocate what they touch, and what operators leave to each other there is
    # touched whole; finding that out took half of a build.
    disabled = ["s_tir.CompactBufferAllocation"] if own_kernels and not target.is_gpu else []
    return tvm.transform.PassContext(opt_level=3, config=dict(config or {}), disabled_pass=disabled)


def tir_pipeline(target: Target) -> str:
    """Return the name of the lowering pipeline for a target's functions."""
    if target.extra.get("early_launches", False):
        compilation_pipeline.PIPELINE_MAP[EARLY_PIPELINE] = _early_pipeline
        return EARLY_PIPELINE
    if target.device in ("cpu", "cuda"):
        return "default"
    metal = target.device == "metal" and target.limits is not None
    simd_width = target.limits.simd_width if metal else 0

    def pipeline() -> Any:
        lower, finish_host, finish_device = compilation_pipeline.get_tir_pipeline("default")

        def finish() -> Any:
            own = [lanes_within(simd_width)] if metal else []
            return tvm.transform.Sequential([*own, finish_device()])

        return tvm.transform.Sequential([widen_bound_values(), lower]), finish_host, finish

    name = METAL_PIPELINE if metal else GPU_PIPELINE
    compilation_pipeline.PIPELINE_MAP[name] = pipeline
    return name


def _early_pipeline() -> Any:
    lower, finish_host, finish_device = compilation_pipeline.get_tir_pipeline("default")

    def finish() -> Any:
        return tvm.transform.Sequential([wait_for_inputs(), finish_device()])

    return tvm.transform.Sequential([request_early_launches(), lower]), finish_host, finish


def lanes_within(simd_width: int) -> Any:
    """Return a pass that numbers the lanes of shuffles within their simdgroup, a power of two."""

    def mask(call: Any, mutator: Any) -> Any:
        call = mutator.default_mutate(call)
        if getattr(call.op, "name", "") != "tirx.tvm_warp_shuffle":
            return call
        arguments = list(call.args)
        lane = arguments[_LANE]
        arguments[_LANE] = tirx.bitwise_and(lane, tirx.const(simd_width - 1, "int32"))
        return tirx.op.tvm_warp_shuffle(*arguments)

    @tirx.transform.prim_func_pass(opt_level=0, name="LanesWithinSimdgroup")
    def run(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
        return func.with_body(tvm_ffi.structural_mutate(func.body, [(tvm.ir.Call, mask)]))

    return run
