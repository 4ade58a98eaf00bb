"""One row of x with look-ups of products: what 4 bits of codes make of their columns of x.

The other ways look weights up, or compute them, and multiply: for every column of every matrix row.
Here a thread group, which has many matrix rows, first makes the 16 products that 4 bits can stand
for (two stages of one column, or two columns of a single stage) and keeps them in shared memory;
from then on 4 bits of a row cost an index, a load of two floats and two additions. All threads of
a subgroup look into the same 128 bytes, in different banks, since each has a matrix row of its own
and all are at the same column.

A thread group works on ``threads`` times ``rows`` matrix rows; its teams (threadIdx.y) take units
of 16 columns in turn, and add up their sums at the end. Rows must share their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx import Shuffle
from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import ceildiv, launch, local, shared, store, when
from fairy_compile.kernels.gpu_decode import Decode, DecodeShape
from fairy_compile.kernels.gpu_halves import slot_value
from fairy_compile.kernels.gpu_layout import UNIT, code_place
from fairy_compile.kernels.gpu_rows import Rows
from fairy_compile.op.spec import PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

_ENTRIES = 16
_PAIR = 2  # floats of an entry: real and imaginary part
_TABLE = _ENTRIES * _PAIR
_VECTOR = 4  # columns of x that are loaded together
MOST_THREADS = 128  # of a team: 16 for each of the 8 tables of the shortest slots


def group_rows(shape: DecodeShape) -> int:
    """Return the matrix rows of a thread group."""
    return shape.threads * shape.rows


def supports(spec: PhaseSpec, shape: DecodeShape) -> bool:
    """Tell whether the rows of every thread group share their scales."""
    rows = group_rows(shape)
    alone = len(spec.parts) == 1 or all(part % rows == 0 for part in spec.parts)
    return spec.scale == "tensor" and alone


def shared_bytes(spec: PhaseSpec, shape: DecodeShape) -> int:
    """Return the shared memory of tables and of the sums of teams."""
    tables = shape.teams * _tables(spec) * _TABLE
    return 4 * (tables + shape.teams * shape.threads * shape.rows * 2)


def _tables(spec: PhaseSpec) -> int:
    """Return the tables of a unit, one for every 4 bits; rounded up to a power of two."""
    tables = UNIT * 2 * spec.stages * len(spec.terms) // 4
    return 1 << (tables - 1).bit_length()


def _tables_of(stages: int) -> int:
    """Return the tables of a unit's columns of one term and ``stages``."""
    return UNIT * 2 * stages // 4


class ProductsDecode(Decode):
    """Emits one launch; see the module's text."""

    def emit(self, rows_of_x: Rows) -> None:
        """Emit the launch for one row of x, or for one row at a time."""
        shape, spec = self.shape, self.spec
        extents = {
            "blockIdx.y": rows_of_x.groups(1),
            "blockIdx.x": -(-spec.n // group_rows(shape)),
            "threadIdx.y": shape.teams,
            "threadIdx.x": shape.threads,
        }
        self._table_floats = _tables(spec) * _TABLE
        with launch(extents, rows_of_x.arguments) as (group, block, team, thread):
            token = rows_of_x.tile(group, 1).first
            first = T.bind(block * group_rows(shape) + thread)
            rows = [T.bind(T.min(first + r * shape.threads, spec.n - 1)) for r in range(shape.rows)]
            self._tables = shared((shape.teams * self._table_floats,))
            self._load_weights(T.min(block * group_rows(shape), spec.n - 1), thread)
            sums = local((shape.rows * 2,))
            for i in range(shape.rows * 2):
                store(sums, i, T.float32(0))
            self._add_up(rows, token, team, thread, sums)
            self._add_teams(sums, team, thread)
            with when(team == 0):
                for r in range(shape.rows):
                    row = first + r * shape.threads
                    with when(row < spec.n):
                        features = self.weights.feature(row)
                        self._write_token(token, features, [sums[2 * r], sums[2 * r + 1]])

    def _load_weights(self, row: Expr, thread: Expr) -> None:
        """Load what a thread makes products of: the weights its index stands for, of every slot."""
        weights = self.weights
        self._weights = local((len(weights.slots) * 4,))
        code = T.bind(T.cast(T.bitwise_and(thread, T.int32(_ENTRIES - 1)), "uint32"))
        scale_row = T.bind(weights.scale_row(row))
        for slot, (_, _, stages) in enumerate(weights.slots):
            for i, bit in enumerate((0,) if stages == 2 else (0, 2)):
                for axis, value in enumerate(slot_value(weights, slot, code, bit, scale_row)):
                    store(self._weights, slot * 4 + 2 * i + axis, value)

    def _add_up(
        self, rows: Sequence[Expr], token: Expr, team: Expr, thread: Expr, sums: Buffer
    ) -> None:
        shape, weights = self.shape, self.weights
        planes = weights.planes
        words = local((shape.rows * planes,), "uint32")
        # A power of two, so that the index of an entry has no bit of it.
        table = T.bind(T.cast(team * self._table_floats, "uint32"))
        with T.serial(0, ceildiv(weights.units, shape.teams)) as turn:
            unit = T.bind(turn * shape.teams + team)
            # Past the last unit products are 0, so that all teams pass the same barriers.
            own = T.bind(T.min(unit, weights.units - 1))
            for r, row in enumerate(rows):
                self._load_words(words, r * planes, row, own, planes)
            self._multiply_x(token, unit, team, thread)
            number = 0
            for term, first, stages in weights.slots:
                for place in range(_tables_of(stages)):
                    word, bit = code_place(
                        first, self.spec.stages, place if stages == 2 else 2 * place
                    )
                    for r in range(shape.rows):
                        bits = words[r * planes + term * self.spec.stages + word]
                        self._look_up(bits, bit, table, number, sums, r)
                    number += 1

    def _multiply_x(self, token: Expr, unit: Expr, team: Expr, thread: Expr) -> None:
        """Fill a team's tables: a thread has one entry in those of some columns."""
        columns = UNIT * _ENTRIES // self.shape.threads
        index = T.bind(T.bitwise_and(thread, T.int32(_ENTRIES - 1)))
        own = T.bind(T.truncdiv(thread, T.int32(_ENTRIES)))
        x = local((2 * columns,))
        for half in range(2):
            self._load_columns(x, half * columns, token, half, unit, own * columns, columns)
        before = 0
        for slot, (term, _, stages) in enumerate(self.weights.slots):
            conjugate = term == len(self.spec.terms) - 1  # W's
            parts = 2 // stages  # columns of a table
            for i in range(columns // parts):
                sums = local((_PAIR,))
                for part in range(parts):
                    at = i * parts + part
                    w = [self._weights[slot * 4 + 2 * part + axis] for axis in range(2)]
                    values = _product(w, [x[at], x[columns + at]], conjugate)
                    for axis, value in enumerate(values):
                        store(sums, axis, sums[axis] + value if part else value)
                place = own * (columns // parts) + (before + i)
                entry = team * self._table_floats + place * _TABLE + index * _PAIR
                value = Shuffle([sums[0], sums[1]], [0, 1])
                store(self._tables, T.ramp(entry, 1, _PAIR), value)
            before += _tables_of(stages)

    def _load_columns(
        self,
        into: Buffer,
        at: int,
        token: Expr,
        half: int,
        unit: Expr,
        first: Expr,
        count: int,
    ) -> None:
        """Load columns of one half of x as float32, 0 from column m on."""
        spec, units = self.spec, self.weights.units
        whole = spec.m % UNIT == 0
        lanes = min(count, _VECTOR) if whole else 1
        column = T.bind(unit * UNIT + first)
        for i in range(0, count, lanes):
            # Of the last unit where there is none, which is read and not used.
            place = column + i
            if not (whole and units % self.shape.teams == 0):
                place = T.min(place, spec.m - lanes)
            index = half * spec.m + place
            loaded = self.x[token, T.ramp(index, 1, lanes) if lanes > 1 else index]
            if spec.dtype != "float32":
                loaded = T.cast(loaded, f"float32x{lanes}" if lanes > 1 else "float32")
            store(into, T.ramp(at + i, 1, lanes) if lanes > 1 else at + i, loaded)
            if not (whole and units % self.shape.teams == 0):
                for lane in range(lanes):
                    kept = T.if_then_else(column + i + lane < spec.m, into[at + i + lane], 0.0)
                    store(into, at + i + lane, kept)

    def _look_up(
        self, word: Expr, bit: int, table: Expr, number: int, sums: Buffer, r: int
    ) -> None:
        """Add the product that 4 bits of a word stand for to a row's sums."""
        # The index times two, in two operations; an or, which GPUs do together with the and.
        moved = T.shift_right(word, T.uint32(bit - 1)) if bit else T.shift_left(word, T.uint32(1))
        index = T.bitwise_or(T.bitwise_and(moved, T.uint32((_ENTRIES - 1) * _PAIR)), table)
        at = T.cast(index, "int32") + number * _TABLE
        value = local((_PAIR,))
        store(value, T.ramp(0, 1, _PAIR), self._tables[T.ramp(at, 1, _PAIR)])
        for axis in range(_PAIR):
            store(sums, 2 * r + axis, sums[2 * r + axis] + value[axis])

    def _add_teams(self, sums: Buffer, team: Expr, thread: Expr) -> None:
        """Add the sums of all teams to those of the first."""
        shape = self.shape
        if shape.teams == 1:
            return
        count = shape.rows * 2
        partial = shared((shape.teams * count * shape.threads,))
        for i in range(count):
            store(partial, (team * count + i) * shape.threads + thread, sums[i])
        with when(team == 0):
            for i in range(count):
                total: Any = sums[i]
                for other in range(1, shape.teams):
                    total = total + partial[(other * count + i) * shape.threads + thread]
                store(sums, i, total)


def _product(w: Sequence[Expr], x: Sequence[Expr], conjugate: bool) -> tuple[Expr, Expr]:
    """Return both parts of w x, or of w times the conjugate of x."""
    if conjugate:
        return w[0] * x[0] + w[1] * x[1], w[1] * x[0] - w[0] * x[1]
    return w[0] * x[0] - w[1] * x[1], w[1] * x[0] + w[0] * x[1]
