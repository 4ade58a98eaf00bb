"""The matrix units of Apple GPUs: simdgroup matrices of 8x8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.backend.metal import op as metal
from tvm.tirx.script import builder as T

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

    def load_right(self, matrices: Buffer, at: int, pointer: Any, stride: int) -> None:
        """See `MatrixUnits.load_right`."""
        T.evaluate(metal.simdgroup_load(matrices.data, at, pointer, stride))

    def load_left(self, matrices: Buffer, at: int, pointer: Any, stride: int) -> None:
        """See `MatrixUnits.load_left`."""
        T.evaluate(
            metal.simdgroup_load(matrices.data, at, pointer, stride, transpose_matrix=True)
        )

    def multiply(self, sums: Buffer, at: int, left: Buffer, i: int, right: Buffer, j: int) -> None:
        """See `MatrixUnits.multiply`."""
        T.evaluate(
            metal.simdgroup_multiply_accumulate(
                sums.data, at, left.data, i, right.data, j, sums.data, at
            )
        )

    def store(self, sums: Buffer, at: int, pointer: Any, stride: int) -> None:
        """See `MatrixUnits.store`."""
        T.evaluate(metal.simdgroup_store(sums.data, at, pointer, stride))
