"""Metal: the shared GPU kernels, with sums by simdgroup and its matrix units for many rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu import GpuKernel
from fairy_compile.kernels.gpu_builder import local, store
from fairy_compile.kernels.gpu_decode import DecodeShape, Reduce
from fairy_compile.kernels.gpu_matrix_tile import matrix_tile
from fairy_compile.kernels.gpu_prefill import phase_tile_gemm
from fairy_compile.kernels.gpu_tile import OUTPUTS, TileGemm
from fairy_compile.kernels.gpu_weights import Weights
from fairy_compile.kernels.metal_tile import SimdgroupUnits
from fairy_compile.op import PhaseSpec

if TYPE_CHECKING:
    from tvm.tirx import Buffer

    from fairy_compile.targets import Target


class MetalKernel(GpuKernel):
    """`GpuKernel` with what Apple GPUs have: simdgroups that add up, and multiply matrices."""

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

    def shared_bytes(self, spec: PhaseSpec, target: Target) -> int:
        """Return the shared memory of the larger launch with default knobs."""
        tokens = self._tile_tokens(spec, "auto")
        return super().shared_bytes(spec, target) + 4 * OUTPUTS * tokens

    def tile_gemm(
        self, weights: Weights, y: Buffer, tokens: int, target: Target, knobs: Mapping[str, Any]
    ) -> TileGemm:
        """Return the launch for many rows of x."""
        return phase_tile_gemm(weights, y, tokens, matrix_tile(SimdgroupUnits()))


METAL_KERNELS = (MetalKernel(),)
"""The family, best first."""
