"""Vulkan: the shared GPU kernels, with sums by subgroup where a target fixes the subgroup's size.

A driver may choose the size of subgroups anew for every pipeline. Only targets whose hardware has
one size state it as ``simd_width`` and have the feature ``subgroups``; elsewhere sums go through
shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu import GpuKernel
from fairy_compile.kernels.gpu_builder import local, store
from fairy_compile.kernels.gpu_decode import DecodeShape, Reduce

if TYPE_CHECKING:
    from fairy_compile.targets import Target


class VulkanKernel(GpuKernel):
    """`GpuKernel` whose teams of one subgroup add up without memory."""

    def __init__(self) -> None:
        super().__init__("vulkan")

    def reduction(self, shape: DecodeShape, target: Target) -> Reduce:
        """Return how the threads of a team add up their sums."""
        if not target.has("subgroups") or shape.threads != target.limits.simd_width:
            return super().reduction(shape, target)

        def reduce(values: Sequence[Any], thread: Any, team: Any) -> Sequence[Any]:
            totals = local((len(values),))
            for i, value in enumerate(values):
                store(totals, i, T.call_pure_extern("float32", "subgroupAdd", value))
            return [totals[i] for i in range(len(values))]

        return reduce


VULKAN_KERNELS = (VulkanKernel(),)
"""The family, best first."""
