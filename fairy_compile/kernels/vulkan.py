"""Vulkan: the shared GPU kernels, with sums by subgroup where a target fixes the subgroup's size.

A driver may choose the size of subgroups anew for every pipeline. Only targets whose hardware has
one size state it as ``simd_width`` and have the feature ``subgroups``; elsewhere sums go through
shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu import GpuKernel
from fairy_compile.kernels.gpu_builder import local, shared, store, when
from fairy_compile.kernels.gpu_decode import DecodeShape, Reduce
from fairy_compile.kernels.gpu_matrix_tile import SUBGROUP, matrix_tile
from fairy_compile.kernels.gpu_prefill import phase_tile_gemm
from fairy_compile.kernels.gpu_tile import TileGemm
from fairy_compile.kernels.gpu_weights import Weights
from fairy_compile.kernels.vulkan_tile import CooperativeUnits

if TYPE_CHECKING:
    from tvm.tirx import Buffer

    from fairy_compile.targets import Target


class VulkanKernel(GpuKernel):
    """`GpuKernel` whose subgroups add up without memory, and multiply matrices.

    Knobs:
        matrices: many rows of x of float16 are multiplied by cooperative matrices, where the target
            has the feature ``cooperative_matrix`` and subgroups of 32.
    """

    knobs: Mapping[str, Sequence[Any]] = {**GpuKernel.knobs, "matrices": (False, True)}

    def __init__(self) -> None:
        super().__init__("vulkan")

    def reduction(self, shape: DecodeShape, target: Target) -> Reduce:
        """Return how the threads of a team add up their sums.

        Subgroups are made of neighbours along threadIdx.x, of which a team has a multiple.
        """
        width = target.limits.simd_width
        if not self._by_subgroup(shape, target):
            return super().reduction(shape, target)

        def reduce(values: Sequence[Any], thread: Any, team: Any) -> Sequence[Any]:
            sums = [T.call_pure_extern("float32", "subgroupAdd", value) for value in values]
            totals = local((len(values),))
            for i, value in enumerate(sums):
                store(totals, i, value)
            subgroups = shape.threads // width
            if subgroups > 1:
                _add_subgroups(totals, len(values), thread, team, width, subgroups, shape.teams)
            return [totals[i] for i in range(len(values))]

        return reduce

    def reduce_bytes(self, shape: DecodeShape, target: Target) -> int:
        """See `GpuKernel.reduce_bytes`."""
        every = super().reduce_bytes(shape, target)
        return every // target.limits.simd_width if self._by_subgroup(shape, target) else every

    def tile_gemm(
        self, weights: Weights, y: Buffer, tokens: int, target: Target, knobs: Mapping[str, Any]
    ) -> TileGemm:
        """See `GpuKernel.tile_gemm`."""
        has_units = target.has("cooperative_matrix") and target.limits.simd_width == SUBGROUP
        if knobs["matrices"] and has_units and weights.spec.dtype == "float16":
            gemm = phase_tile_gemm(weights, y, tokens, matrix_tile(CooperativeUnits()))
            if gemm.shared_bytes <= target.limits.shared_bytes:
                return gemm
        return super().tile_gemm(weights, y, tokens, target, knobs)

    @staticmethod
    def _by_subgroup(shape: DecodeShape, target: Target) -> bool:
        return target.has("subgroups") and shape.threads % target.limits.simd_width == 0


def _add_subgroups(
    totals: Buffer, count: int, thread: Any, team: Any, width: int, subgroups: int, teams: int
) -> None:
    """Replace the sums of a subgroup by those of all subgroups of its team."""
    # Memories apart: in one, TVM would see conflicts between different values.
    memories = [shared((teams * subgroups,)) for _ in range(count)]
    first = team * subgroups
    with when(T.floormod(thread, width) == 0):
        for i, memory in enumerate(memories):
            store(memory, first + T.floordiv(thread, width), totals[i])
    for i, memory in enumerate(memories):
        total = memory[first]
        for other in range(1, subgroups):
            total = total + memory[first + other]
        store(totals, i, total)


VULKAN_KERNELS = (VulkanKernel(),)
"""The family, best first."""
