"""`gpu_tile.TileGemm` on the matrix units of Apple GPUs.

Eight simdgroups share a tile of 64 outputs and ``tokens`` rows of x: four along the outputs, two
along the rows, in matrices of 8x8. Products of float16 are summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.backend.metal import op as metal
from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import ceildiv, launch, shared, when
from fairy_compile.kernels.gpu_tile import DEPTH, GROUP, OUTPUTS, TileGemm

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

SIDE = 8
"""Rows and columns of a matrix."""
_SIMD = 32
_ALONG_OUTPUTS, _ALONG_TOKENS = 4, 2


@dataclass(frozen=True)
class SimdgroupTileGemm(TileGemm):
    """One launch of y = x A^T with simdgroup matrices."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread group: the tiles, and the outputs in float32."""
        return super().shared_bytes + 4 * OUTPUTS * self.tokens

    def emit(self, x: Buffer, batch: Expr) -> None:
        """Emit the launch."""
        extents = {
            "blockIdx.y": ceildiv(batch, self.tokens),
            "blockIdx.x": self.outputs,
            "threadIdx.x": GROUP,
        }
        columns = OUTPUTS // _ALONG_OUTPUTS // SIDE
        rows = self.tokens // _ALONG_TOKENS // SIDE
        with launch(extents) as (token_block, block, thread):
            weight_tile = shared((DEPTH, OUTPUTS), self.dtype)
            x_tile = shared((DEPTH, self.tokens), self.dtype)
            y_tile = shared((self.tokens, OUTPUTS))
            sums = _matrices(rows * columns, "float32")
            simdgroup = T.bind(T.floordiv(thread, _SIMD))
            output = T.bind(T.floormod(simdgroup, _ALONG_OUTPUTS) * (columns * SIDE))
            token = T.bind(T.floordiv(simdgroup, _ALONG_OUTPUTS) * (rows * SIDE))
            for i in range(rows * columns):
                T.evaluate(metal.make_filled_simdgroup_matrix(sums.data, i, T.float32(0)))
            with T.serial(0, self.steps) as step:
                self.fill_weight(weight_tile, block, step, thread)
                self._fill_x(x_tile, x, batch, token_block, step, thread)
                self._multiply_matrices(weight_tile, x_tile, output, token, sums, (rows, columns))
            for r in range(rows):
                for c in range(columns):
                    at = (token + r * SIDE) * OUTPUTS + output + c * SIDE
                    pointer = y_tile.access_ptr("w", offset=at)
                    T.evaluate(metal.simdgroup_store(sums.data, r * columns + c, pointer, OUTPUTS))
            with T.serial(0, self.tokens * OUTPUTS // GROUP) as turn:
                at = T.bind(turn * GROUP + thread)
                j, b = T.bind(T.floormod(at, OUTPUTS)), T.bind(T.floordiv(at, OUTPUTS))
                row = T.bind(token_block * self.tokens + b)
                with when(row < batch):
                    self.write(row, block, j, y_tile[b, j])

    def _multiply_matrices(
        self,
        weight_tile: Buffer,
        x_tile: Buffer,
        output: Expr,
        token: Expr,
        sums: Buffer,
        shape: tuple[int, int],
    ) -> None:
        rows, columns = shape
        weights = _matrices(columns, self.dtype)
        values = _matrices(rows, self.dtype)
        for depth in range(0, DEPTH, SIDE):
            for c in range(columns):
                pointer = weight_tile.access_ptr("r", offset=depth * OUTPUTS + output + c * SIDE)
                T.evaluate(metal.simdgroup_load(weights.data, c, pointer, OUTPUTS))
            for r in range(rows):
                pointer = x_tile.access_ptr("r", offset=depth * self.tokens + token + r * SIDE)
                T.evaluate(
                    metal.simdgroup_load(
                        values.data, r, pointer, self.tokens, transpose_matrix=True
                    )
                )
            for r in range(rows):
                for c in range(columns):
                    at = r * columns + c
                    T.evaluate(
                        metal.simdgroup_multiply_accumulate(
                            sums.data, at, values.data, r, weights.data, c, sums.data, at
                        )
                    )


def _matrices(count: int, dtype: str) -> Any:
    return T.sblock_alloc_buffer((count * SIDE * SIDE,), dtype, scope="metal.simdgroup")
