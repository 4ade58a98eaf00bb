"""The matrix units of Vulkan devices: cooperative matrices of 16x16 (VK_KHR_cooperative_matrix).

NVIDIA's and AMD's drivers have that size for float16 factors and float32 sums.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.codegen.spirv.enums import CooperativeMatrixUse as Use
from fairy_compile.codegen.spirv.matrices import SCOPE
from fairy_compile.kernels.gpu_matrix_tile import Place, pointer_to

if TYPE_CHECKING:
    from tvm.tirx import Buffer

SIDE = 16
"""Rows and columns of a matrix."""
_SHAPE = (SIDE, SIDE, SIDE)


class CooperativeUnits:
    """Implements `gpu_matrix_tile.MatrixUnits`."""

    side = SIDE

    def matrices(self, count: int, dtype: str) -> Buffer:
        """See `MatrixUnits.matrices`."""
        return T.sblock_alloc_buffer((count * SIDE * SIDE,), dtype, scope=SCOPE)

    def clear(self, matrices: Buffer, at: int) -> None:
        """See `MatrixUnits.clear`."""
        T.evaluate(T.cooperative_tensor_fill(matrices.data, at, T.float32(0), SIDE, SIDE))

    def load_right(self, matrices: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """See `MatrixUnits.load_right`."""
        self._load(matrices, at, tile, place, False, Use.MatrixB)

    def load_left(self, matrices: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """See `MatrixUnits.load_left`."""
        self._load(matrices, at, tile, place, True, Use.MatrixA)

    @staticmethod
    def _load(
        matrices: Buffer, at: int, tile: Buffer, place: Place, transpose: bool, use: Use
    ) -> None:
        pointer, stride = pointer_to(tile, place, "r"), tile.shape[1]
        T.evaluate(
            T.cooperative_tensor_load(
                matrices.data, at, pointer, stride, SIDE, SIDE, transpose, *_SHAPE, int(use)
            )
        )

    def multiply(self, sums: Buffer, at: int, left: Buffer, i: int, right: Buffer, j: int) -> None:
        """See `MatrixUnits.multiply`."""
        T.evaluate(
            T.cooperative_tensor_multiply_accumulate(
                sums.data, at, left.data, i, right.data, j, sums.data, at, *_SHAPE
            )
        )

    def store(self, sums: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """See `MatrixUnits.store`."""
        pointer, stride = pointer_to(tile, place, "w"), tile.shape[1]
        use = int(Use.MatrixAccumulator)
        T.evaluate(
            T.cooperative_tensor_store(
                sums.data, at, pointer, stride, SIDE, SIDE, False, *_SHAPE, use
            )
        )
