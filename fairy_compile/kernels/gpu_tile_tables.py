"""Few rows of x by tables of weights whose scales change along a row: a table for every tile.

A thread group's rows lie in one row of tiles, so that 64 columns have one table for all of them,
and the tables of the tiles ahead are computed together, some 4 kB of them at a time. A team has
four threads, which take the four units of a tile: all threads of a simdgroup then look into one
table, though they have different rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import ceildiv
from fairy_compile.kernels.gpu_decode import Decode, DecodeShape, Unit
from fairy_compile.kernels.gpu_layout import UNIT
from fairy_compile.kernels.gpu_rows import Tile
from fairy_compile.kernels.gpu_tables import make_tables, table_bytes
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.phase.tensor import TILE

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

THREADS = TILE // UNIT
_BYTES = 4096


def tiles_shape(spec: PhaseSpec, shape: DecodeShape) -> DecodeShape | None:
    """Return the shape of a launch with a table for every tile, of as many threads at most.

    Args:
        spec: of a call with scales a tile.
        shape: whose ``rows`` and ``tokens`` are kept.

    Returns:
        None where rows of a team would lie in two tiles.
    """
    teams = min(shape.threads * shape.teams // THREADS, TILE // shape.rows)
    while teams and any(part % (teams * shape.rows) for part in spec.parts):
        teams //= 2
    if not teams:
        return None
    return replace(shape, threads=THREADS, teams=teams, weights="tiles")


class TilesDecode(Decode):
    """A table for every tile of 64 columns."""

    def prepare(self, block: Expr, team: Expr, thread: Expr, rows: Sequence[Expr]) -> None:
        """See `Decode.prepare`."""
        shape, tiles = self.shape, ceildiv(self.spec.m, TILE)
        self._tiles = min(tiles, _BYTES // table_bytes(len(self.weights.slots)))
        self.tables = make_tables(self.weights, self._tiles)
        self._thread = T.bind(team * shape.threads + thread)
        self._scale_row = T.bind(self.weights.scale_row(block * shape.group_rows))

    def table(self, unit: Unit, r: int) -> Expr:
        """See `Decode.table`."""
        return T.floordiv(unit.number, TILE // UNIT) - self._first_tile

    def _multiply(
        self, rows: Sequence[Expr], tokens: Sequence[Expr], tile: Tile, thread: Expr, sums: Buffer
    ) -> None:
        shape, last = self.shape, ceildiv(self.spec.m, TILE) - 1
        self._registers()
        # A step has 1, 2 or 4 units. Where there are several chunks, of 8 tiles or a multiple,
        # each is a whole number of turns, so that what is loaded ahead is of the next chunk.
        steps = self._tiles * (TILE // UNIT) // self._together
        with T.serial(0, tile.turns(ceildiv(last + 1, self._tiles))) as chunk:
            self._first_tile = T.bind(chunk * self._tiles)
            self.tables.fill(
                lambda i: (self._scale_row, T.min(self._first_tile + i, last)),
                self._thread,
                shape.teams * shape.threads,
            )
            with T.serial(0, ceildiv(steps, shape.threads)) as turn:
                step = chunk * steps + turn * shape.threads + thread
                self._take_step(rows, tokens, step, sums)
