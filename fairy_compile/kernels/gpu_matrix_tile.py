"""`gpu_tile.TileGemm` on matrix units: subgroups of threads multiply whole matrices.

The subgroups of a thread group share a tile of 64 outputs and ``tokens`` rows of x, four along the
outputs, the others along the rows. Products of float16 are summed in float32. What a matrix is and
how it is loaded differs by device; `MatrixUnits` says it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import launch, shared, when
from fairy_compile.kernels.gpu_rows import Rows
from fairy_compile.kernels.gpu_tile import DEPTH, GROUP, OUTPUTS, TileGemm

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

SUBGROUP = 32
"""Threads that hold a matrix together."""
Place = tuple[Any, Any]
"""Row and column in a tile."""
_ALONG_OUTPUTS = 4
_ALONG_TOKENS = GROUP // SUBGROUP // _ALONG_OUTPUTS


class MatrixUnits(Protocol):
    """What a device has.

    Attributes:
        side: rows and columns of its matrices.
    """

    side: int

    def matrices(self, count: int, dtype: str) -> Buffer:
        """Allocate matrices of a subgroup."""

    def clear(self, matrices: Buffer, at: int) -> None:
        """Set a matrix of sums to zero."""

    def load_right(self, matrices: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """Load a right factor, whose rows are rows of the tile, from a place of it on."""

    def load_left(self, matrices: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """Load a left factor, whose columns are rows of the tile."""

    def multiply(self, sums: Buffer, at: int, left: Buffer, i: int, right: Buffer, j: int) -> None:
        """Add the product of two matrices to the sums."""

    def store(self, sums: Buffer, at: int, tile: Buffer, place: Place) -> None:
        """Store sums, their rows into rows of the tile."""


@dataclass(frozen=True)
class MatrixTileGemm(TileGemm):
    """One launch of y = x A^T on matrix units.

    Attributes:
        units: of the device.
    """

    units: MatrixUnits = field(kw_only=True)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread group: the tiles, and the outputs in float32."""
        return super().shared_bytes + 4 * OUTPUTS * self.tokens

    def emit(self, x: Buffer, rows: Rows) -> None:
        """Emit the launch for all rows of x."""
        extents = {
            "blockIdx.y": rows.groups(self.tokens),
            "blockIdx.x": self.outputs,
            "threadIdx.x": GROUP,
        }
        units, side = self.units, self.units.side
        columns = OUTPUTS // _ALONG_OUTPUTS // side
        count = self.tokens // _ALONG_TOKENS // side
        with launch(extents, rows.arguments) as (group, block, thread):
            tile = rows.tile(group, self.tokens)
            first, end = tile.first, tile.end
            weight_tile = shared((DEPTH, OUTPUTS), self.dtype)
            x_tile = shared((DEPTH, self.tokens), self.dtype)
            y_tile = shared((self.tokens, OUTPUTS))
            sums = units.matrices(count * columns, "float32")
            subgroup = T.bind(T.floordiv(thread, SUBGROUP))
            output = T.bind(T.floormod(subgroup, _ALONG_OUTPUTS) * (columns * side))
            token = T.bind(T.floordiv(subgroup, _ALONG_OUTPUTS) * (count * side))
            for i in range(count * columns):
                units.clear(sums, i)
            with T.serial(0, tile.turns(self.steps)) as step:
                self.fill_weight(weight_tile, block, step, thread)
                self._fill_x(x_tile, x, first, end, step, thread)
                self._multiply_matrices(weight_tile, x_tile, output, token, sums, (count, columns))
            for r in range(count):
                for c in range(columns):
                    place = token + r * side, output + c * side
                    units.store(sums, r * columns + c, y_tile, place)
            with T.serial(0, self.tokens * OUTPUTS // GROUP) as turn:
                at = T.bind(turn * GROUP + thread)
                j, b = T.bind(T.floormod(at, OUTPUTS)), T.bind(T.floordiv(at, OUTPUTS))
                row = T.bind(first + b)
                with when(row < end):
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
        units, side = self.units, self.units.side
        weights = units.matrices(columns, self.dtype)
        values = units.matrices(rows, self.dtype)
        for depth in range(0, DEPTH, side):
            for c in range(columns):
                units.load_right(weights, c, weight_tile, (depth, output + c * side))
            for r in range(rows):
                units.load_left(values, r, x_tile, (depth, token + r * side))
            for r in range(rows):
                for c in range(columns):
                    units.multiply(sums, r * columns + c, values, r, weights, c)


def pointer_to(tile: Buffer, place: Place, access: str) -> Any:
    """Return the pointer to a place in a tile, to read (``r``) or write (``w``)."""
    return tile.access_ptr(access, offset=place[0] * tile.shape[1] + place[1])


def matrix_tile(units: MatrixUnits) -> Callable[..., TileGemm]:
    """Return what makes launches on a device's matrix units, for `phase_tile_gemm`."""

    def make(**fields: Any) -> TileGemm:
        return MatrixTileGemm(**fields, units=units)

    return make
