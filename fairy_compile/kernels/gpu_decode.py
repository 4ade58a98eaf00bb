"""Few rows of x: every thread decodes its share of a matrix row and multiplies at once.

A team of threads (threadIdx.x) shares ``rows`` complex matrix rows. Its threads take units of 16
columns in turn, so that neighbours read neighbouring words, and add up their sums at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import ceildiv, launch, local, store, when
from fairy_compile.kernels.gpu_layout import UNIT, code_place
from fairy_compile.kernels.gpu_rows import OneRow, Rows, Tile
from fairy_compile.kernels.gpu_tables import Tables, make_tables
from fairy_compile.kernels.gpu_weights import Weights
from fairy_compile.op.spec import PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

Reduce = Callable[[Sequence[Any], Any, Any], Sequence[Any]]
"""reduce(values, thread of the team, team) -> their sums over the team, for its first thread."""

Lookup = Literal["bits", "table", "tiles", "halves", "blocks", "products"]
"""How a launch gets from codes to weights."""

_CHUNK = 4


@dataclass(frozen=True)
class DecodeShape:
    """How a launch is cut.

    Attributes:
        threads: of a team.
        teams: of a thread group.
        rows: complex matrix rows of a team.
        tokens: rows of x of a thread group.
        weights: ``bits`` decodes every code, ``table`` looks them up, see `gpu_tables`, and
            ``tiles`` where scales change along a row, see `gpu_tile_tables`; ``halves``
            and ``blocks`` do so with products in float16, see `gpu_halves`; ``products`` looks
            products up, where rows are those of threads, not of teams, see `gpu_products`.
        ahead: load the words of the next turn before this turn's are used.
        copies: of the table of ``blocks``.
    """

    threads: int
    teams: int
    rows: int
    tokens: int
    weights: Lookup = "bits"
    ahead: bool = False
    copies: int = 1

    @property
    def group_rows(self) -> int:
        """Complex matrix rows of a thread group."""
        return self.teams * self.rows


@dataclass(frozen=True)
class Unit:
    """The 16 columns of every row of a team that a thread multiplies next.

    Attributes:
        number: of the unit in its row.
        words: codes of the rows' steps, row after row.
        first: place of the unit's first word in ``words``, in the first row.
        row_words: words of a row's step.
        scales: of the rows' planes, where the launch looks nothing up.
    """

    number: Expr
    words: Buffer
    first: int
    row_words: int
    scales: Buffer

    def at(self, r: int) -> int:
        """Return the place of the unit's first word of row ``r``."""
        return r * self.row_words + self.first


class Decode:
    """Emits one launch; arguments are declared by the caller."""

    def __init__(
        self, weights: Weights, x: Buffer | OneRow, y: Buffer, shape: DecodeShape, reduce: Reduce
    ) -> None:
        self.weights, self.x, self.y = weights, x, y
        self.shape, self.reduce = shape, reduce
        self.spec: PhaseSpec = weights.spec

    def emit(self, rows_of_x: Rows) -> None:
        """Emit the launch for all rows of x."""
        shape, spec = self.shape, self.spec
        extents = {
            "blockIdx.y": rows_of_x.groups(shape.tokens),
            "blockIdx.x": -(-spec.n // (shape.teams * shape.rows)),
            "threadIdx.y": shape.teams,
            "threadIdx.x": shape.threads,
        }
        with launch(extents, rows_of_x.arguments) as (group, block, team, thread):
            tile = rows_of_x.tile(group, shape.tokens)
            token, end = tile.first, tile.end
            first = T.bind((block * shape.teams + team) * shape.rows)
            rows = [T.bind(T.min(first + r, spec.n - 1)) for r in range(shape.rows)]
            tokens = [
                token if shape.tokens == 1 else T.bind(T.min(token + b, end - 1))
                for b in range(shape.tokens)
            ]
            self._begin(rows, thread)
            self.prepare(block, team, thread, rows)
            sums = local((shape.rows * shape.tokens * 2,))
            for i in range(shape.rows * shape.tokens * 2):
                store(sums, i, T.float32(0))
            self._multiply(rows, tokens, tile, thread, sums)
            values = self.reduce(
                [sums[i] for i in range(shape.rows * shape.tokens * 2)], thread, team
            )
            with when(thread == 0):
                for r in range(shape.rows):
                    with when(first + r < spec.n):
                        self._write(first + r, token, end, values, r)

    def prepare(self, block: Expr, team: Expr, thread: Expr, rows: Sequence[Expr]) -> None:
        """Emit what a thread group does before its first turn."""
        shape, last = self.shape, self.spec.n - 1
        self.tables: Tables | None = None
        if shape.weights == "table":
            self.tables = make_tables(self.weights, shape.group_rows)
            first = block * shape.group_rows
            self.tables.fill(
                lambda r: (self.weights.scale_row(T.min(first + r, last)), T.int32(0)),
                team * shape.threads + thread,
                shape.teams * shape.threads,
            )
        self._first_table = team * shape.rows

    def table(self, unit: Unit, r: int) -> Expr:
        """Return the table that a unit of row ``r`` of a team is looked up in."""
        return self._first_table + r

    def finish(self, value: Any, r: int) -> Any:
        """Return an output of row ``r`` of a team, given the sum over its threads."""
        return value

    def _multiply(
        self, rows: Sequence[Expr], tokens: Sequence[Expr], tile: Tile, thread: Expr, sums: Buffer
    ) -> None:
        self._registers()
        if not self.weights.tiled and self.shape.weights == "bits":
            self._load_scales(rows, T.int32(0))
        with T.serial(0, tile.turns(ceildiv(self._steps, self.shape.threads))) as turn:
            self._take_step(rows, tokens, turn * self.shape.threads + thread, sums)

    def _registers(self) -> None:
        shape, planes = self.shape, self.weights.planes
        count = shape.rows * self._together * planes
        self._now = local((count,), "uint32") if shape.ahead else self._words
        self._scales = local((shape.rows * planes * 2,), "uint32")

    def _load_scales(self, rows: Sequence[Expr], unit: Expr) -> None:
        for r, row in enumerate(rows):
            self.weights.load_scales(self._scales, r * self.weights.planes * 2, row, unit)

    def _take_step(
        self, rows: Sequence[Expr], tokens: Sequence[Expr], number: Expr, sums: Buffer
    ) -> None:
        """Load and multiply the units of a step, if the row has so many."""
        shape, planes, together = self.shape, self.weights.planes, self._together
        step = T.bind(number)
        with when(step < self._steps):
            if shape.ahead:
                for i in range(shape.rows * together * planes):
                    store(self._now, i, self._words[i])
                self._load_step(rows, T.min(step + shape.threads, self._steps - 1))
            else:
                self._load_step(rows, step)
            for v in range(together):
                unit = T.bind(step * together + v)
                if self.weights.tiled and shape.weights == "bits":
                    self._load_scales(rows, unit)
                own = Unit(unit, self._now, v * planes, together * planes, self._scales)
                self.multiply_unit(own, tokens, sums)

    def _begin(self, rows: Sequence[Expr], thread: Expr) -> None:
        """Cut rows into steps; load the first one's words if they are loaded ahead."""
        weights, planes = self.weights, self.weights.planes
        # Units that make up a load of 128 bits.
        most = max(1, 4 // planes)
        self._together = most if weights.units % most == 0 else 1
        self._steps = weights.units // self._together
        self._words = local((len(rows) * self._together * planes,), "uint32")
        if self.shape.ahead:
            self._load_step(rows, T.min(thread, self._steps - 1))

    def _load_step(self, rows: Sequence[Expr], step: Expr) -> None:
        count = self._together * self.weights.planes
        for r, row in enumerate(rows):
            self._load_words(self._words, r * count, row, step, count)

    def _load_words(self, words: Buffer, at: int, row: Expr, step: Expr, count: int) -> None:
        lanes = next(lanes for lanes in (4, 2, 1) if count % lanes == 0)
        for i in range(0, count, lanes):
            source = step * count + i
            if lanes == 1:
                store(words, at + i, self.weights.codes[row, source])
            else:
                store(
                    words,
                    T.ramp(at + i, 1, lanes),
                    self.weights.codes[row, T.ramp(source, 1, lanes)],
                )

    def multiply_unit(self, unit: Unit, tokens: Sequence[Expr], sums: Buffer) -> None:
        """Multiply one unit of every row with all tokens."""
        shape, weights, spec = self.shape, self.weights, self.spec
        values = local((shape.tokens * 2 * _CHUNK,))
        block = local((4,))
        moved = local((shape.rows * len(weights.slots),), "uint32")
        half_unit = UNIT // 2
        if self.tables is not None:
            for r in range(shape.rows):
                self.tables.combine(unit.words, unit.at(r))
        for half_of_unit in range(2):  # each has its own words where codes take 4 bits
            with T.serial(0, half_unit // _CHUNK) as turn:
                column = T.bind(half_of_unit * half_unit + turn * _CHUNK)
                for b, token in enumerate(tokens):
                    for half in range(2):
                        self._load_x(
                            values, (b * 2 + half) * _CHUNK, token, half, unit.number, column
                        )
                for r in range(shape.rows):
                    for i, (k, t, stages) in enumerate(weights.slots):
                        word, bit = code_place(t, spec.stages, half_of_unit * half_unit)
                        at = unit.at(r) + k * spec.stages + word
                        by = T.cast(bit + turn * (_CHUNK * 2 * stages), "uint32")
                        store(moved, r * len(weights.slots) + i, T.shift_right(unit.words[at], by))
                for c in range(_CHUNK):
                    for r in range(shape.rows):
                        at = r * len(weights.slots)
                        if self.tables is None:
                            bits = [
                                (moved[at + i], c * 2 * stages)
                                for i, (_, _, stages) in enumerate(weights.slots)
                            ]
                            weights.block(bits, unit.scales, r * weights.planes * 2, block)
                        else:
                            self.tables.block(moved, at, c, self.table(unit, r), block)
                        self._add(values, c, block, r, sums)

    def _add(self, values: Buffer, c: int, block: Buffer, r: int, sums: Buffer) -> None:
        """Add the products of a row's block with column c of all tokens."""
        for b in range(self.shape.tokens):
            re, im = (values[(b * 2 + half) * _CHUNK + c] for half in range(2))
            at = (r * self.shape.tokens + b) * 2
            for half in range(2):
                product = block[2 * half] * re + block[2 * half + 1] * im
                store(sums, at + half, sums[at + half] + product)

    def _load_x(
        self, values: Buffer, at: int, token: Expr, half: int, unit: Expr, inside: Expr
    ) -> None:
        """Load a chunk of columns of one half as float32; columns from m on are 0."""
        m, dtype = self.spec.m, self.spec.dtype
        column = unit * UNIT + inside
        if m % UNIT == 0:
            loaded = self.x[token, T.ramp(half * m + column, 1, _CHUNK)]
            if dtype != "float32":
                loaded = T.cast(loaded, f"float32x{_CHUNK}")
            store(values, T.ramp(at, 1, _CHUNK), loaded)
            return
        for c in range(_CHUNK):
            value = self.x[token, half * m + T.min(column + c, m - 1)]
            value = value if dtype == "float32" else T.cast(value, "float32")
            store(values, at + c, T.if_then_else(column + c < m, value, T.float32(0)))

    def _write(self, row: Expr, token: Any, end: Any, values: Sequence[Any], r: int) -> None:
        shape = self.shape
        features = self.weights.feature(row)
        for b in range(shape.tokens):
            at = (r * shape.tokens + b) * 2
            results = [self.finish(value, r) for value in values[at : at + 2]]
            if shape.tokens == 1:
                self._write_token(token, features, results)
            else:
                with when(token + b < end):
                    self._write_token(token + b, features, results)

    def _write_token(self, token: Any, features: Sequence[Expr], values: Sequence[Any]) -> None:
        for feature, value in zip(features, values, strict=True):
            out = value if self.spec.out_dtype == "float32" else T.cast(value, self.spec.out_dtype)
            store(self.y, (token, feature), out)
