"""Metal: the shared GPU kernels, with sums by simdgroup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu import GpuKernel
from fairy_compile.kernels.gpu_builder import local, store
from fairy_compile.kernels.gpu_decode import DecodeShape, Reduce

if TYPE_CHECKING:
    from fairy_compile.targets import Target


class MetalKernel(GpuKernel):
    """`GpuKernel` with what Apple GPUs have: 32 threads that add up without memory."""

    def __init__(self) -> None:
        super().__init__("metal")

    def reduction(self, shape: DecodeShape, target: Target) -> Reduce:
        """Return how the threads of a team add up their sums: ``simd_sum``, if they are one."""
        if shape.threads != target.limits.simd_width:
            return super().reduction(shape, target)

        def reduce(values: Sequence[Any], thread: Any, team: Any) -> Sequence[Any]:
            totals = local((len(values),))
            for i, value in enumerate(values):
                store(totals, i, T.call_pure_extern("float32", "simd_sum", value))
            return [totals[i] for i in range(len(values))]

        return reduce


METAL_KERNELS = (MetalKernel(),)
"""The family, best first."""
