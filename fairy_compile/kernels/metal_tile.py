"""The matrix units of Apple GPUs: simdgroup matrices of 8x8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.backend.metal import op as metal
from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_matrix_tile import Place, pointer_to

if TYPE_CHECKING:
    from tvm.tirx import Buffer

SIDE = 8
"""Rows and columns of a matrix."""


class SimdgroupUnits:
    """Implements `gpu_matrix_tile.MatrixUnits`."""

    side = SIDE

    def matrices(self, count: int, dtype: str) -> Buffer:
        """See `MatrixUnits.matrices`."""
        return T.sblock_alloc_buffer((count * SIDE * SIDE,), dtype, scope="metal.simdgroup")

    def clear(self, matrices: Buffer, at: int) -> None:
        """See `MatrixUnits.clear`."""
        T.evaluate(metal.make_filled_simdgroup_matrix(matrices.data, at, T.float32(0)))

    def load_right(self, matrices: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """See `MatrixUnits.load_right`."""
        pointer = pointer_to(tile, place, "r")
        T.evaluate(metal.simdgroup_load(matrices.data, at, pointer, tile.shape[1]))

    def load_left(self, matrices: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """See `MatrixUnits.load_left`."""
        pointer, stride = pointer_to(tile, place, "r"), tile.shape[1]
        T.evaluate(metal.simdgroup_load(matrices.data, at, pointer, stride, transpose_matrix=True))

    def multiply(self, sums: Buffer, at: int, left: Buffer, i: int, right: Buffer, j: int) -> None:
        """See `MatrixUnits.multiply`."""
        T.evaluate(
            metal.simdgroup_multiply_accumulate(
                sums.data, at, left.data, i, right.data, j, sums.data, at
            )
        )

    def store(self, sums: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """See `MatrixUnits.store`."""
        pointer = pointer_to(tile, place, "w")
        T.evaluate(metal.simdgroup_store(sums.data, at, pointer, tile.shape[1]))
