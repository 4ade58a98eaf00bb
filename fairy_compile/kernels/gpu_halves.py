"""Few rows of x with products in float16: packed arithmetic, two columns' worth an operation.

GPUs that multiply pairs of float16 at once take half the operations of float32 for as many columns.
Weights come from tables in shared memory that hold float16:

- ``halves``: as in `gpu_tables`, the 16 sums of two stages of a term, a pair of 4 bytes each, one
  table a matrix row. Two look-ups a column for two terms.
- ``blocks``: the 2x2 block of a column (see `gpu_weights`), 8 bytes for every value of all bits of
  a column, of which there may be 8: 256 blocks. One look-up a column. All rows of a thread group
  share the table, so they must share their scales. Threads look at different places, which banks
  serve one after the other; with ``copies`` = 16, each of 16 neighbouring threads has a copy in
  banks of its own.

Entries are divided by a power of two not below the sum of all scales, and outputs multiplied with
it at the end, so that entries are at most 1: products are finite where x is, and as far from
float16's least numbers as x is. The products of one unit of 16 columns are added in float16, and
units in float32. With 2^-11 the rounding of one operation, a unit's sums of k products err by about
sqrt(k) 2^-12 of their size, which is what weights rounded to float16 cost as well; a unit whose 16
products add up to more than 65504 overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx import Shuffle
from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import local, shared, store, strided
from fairy_compile.kernels.gpu_decode import Decode, Unit
from fairy_compile.kernels.gpu_layout import UNIT
from fairy_compile.kernels.gpu_weights import Weights, decode_code
from fairy_compile.op.spec import PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

_PAIR, _BLOCK = 2, 4  # float16 of an entry
_VECTOR = 4  # columns of x that are loaded together; as 8, TVM would load them one by one
_ENTRIES = 16  # of a table of ``halves``
BLOCK_BYTES = 8
_EXPONENT, _MANTISSA_BITS = 0x7F800000, 23


def supports(spec: PhaseSpec) -> bool:
    """Tell whether a call can have products in float16: float16 activations in whole units."""
    return spec.dtype == "float16" and spec.m % UNIT == 0 and spec.scale != "tile64"


def supports_blocks(spec: PhaseSpec, group_rows: int) -> bool:
    """Tell whether ``blocks`` serves a call: up to two stages, one scale for a group's rows."""
    alone = len(spec.parts) == 1 or all(rows % group_rows == 0 for rows in spec.parts)
    return supports(spec) and spec.stages <= 2 and spec.scale == "tensor" and alone


def block_entries(spec: PhaseSpec) -> int:
    """Return the number of blocks: one for every value of a column's bits."""
    return 1 << 2 * spec.stages * len(spec.terms)


class _HalfDecode(Decode):
    """What both ways share: x in pairs, sums of a unit, the power of two."""

    _powers: Sequence[Expr]

    def finish(self, value: Any, r: int) -> Any:
        """See `Decode.finish`."""
        return value * T.reinterpret("float32", self._powers[r])

    def _load_pairs(self, pairs: Buffer, tokens: Sequence[Expr], unit: Expr, first: int) -> None:
        """Load `_VECTOR` columns of all tokens as pairs (re x, im x)."""
        loaded = local((2 * _VECTOR,), "float16")
        for b, token in enumerate(tokens):
            for half in range(2):
                column = half * self.spec.m + unit * UNIT + first
                store(
                    loaded,
                    T.ramp(half * _VECTOR, 1, _VECTOR),
                    self.x[token, T.ramp(column, 1, _VECTOR)],
                )
            for c in range(_VECTOR):
                pair = Shuffle([loaded[c], loaded[_VECTOR + c]], [0, 1])
                store(pairs, T.ramp((b * _VECTOR + c) * _PAIR, 1, _PAIR), pair)

    @staticmethod
    def _pair(buffer: Buffer, number: int) -> Expr:
        return buffer[T.ramp(number * _PAIR, 1, _PAIR)]

    def _accumulate(self, sums: Buffer, number: int, a: Expr, b: Expr, fresh: bool) -> None:
        # Asked for as one operation, since a driver need not join a product and a sum of float16.
        value = a * b if fresh else T.fma(a, b, self._pair(sums, number))
        store(sums, T.ramp(number * _PAIR, 1, _PAIR), value)

    def _flush(self, unit_sums: Buffer, sums: Buffer) -> None:
        """Add the sums of a unit to those of the thread."""
        for i in range(self.shape.rows * self.shape.tokens * 2):
            pair = T.bind(T.cast(self._pair(unit_sums, i), "float32x2"))
            both = Shuffle([pair], [0]) + Shuffle([pair], [1])
            store(sums, i, sums[i] + both)


class HalvesDecode(_HalfDecode):
    """Tables of pairs in float16, one for each matrix row and slot."""

    def prepare(self, block: Expr, team: Expr, thread: Expr, rows: Sequence[Expr]) -> None:
        """See `Decode.prepare`."""
        shape, weights = self.shape, self.weights
        self._slots = len(weights.slots)
        self._table = shared((shape.group_rows * self._slots * _ENTRIES * _PAIR,), "float16")
        self._first = team * shape.rows
        self._powers = [power_of_two(weights, row) for row in rows]

        def entry(number: Expr) -> None:
            own = T.bind(T.floordiv(number, _ENTRIES))
            code = T.bind(T.cast(T.floormod(number, _ENTRIES), "uint32"))
            row = T.bind(T.min(block * shape.group_rows + own, self.spec.n - 1))
            scale_row = T.bind(weights.scale_row(row))
            inverse = T.bind(inverse_power(power_of_two(weights, row)))
            for slot in range(self._slots):
                re, im = slot_value(weights, slot, code, 0, scale_row)
                # The U term goes in as (re, -im): then one sum and one difference make a block.
                if len(self.spec.terms) == 2 and weights.slots[slot][0] == 0:
                    im = -im
                at = (own * self._slots + slot) * _ENTRIES + T.floormod(number, _ENTRIES)
                _store_vector(self._table, at, [re * inverse, im * inverse])

        strided(
            shape.group_rows * _ENTRIES,
            team * shape.threads + thread,
            shape.teams * shape.threads,
            entry,
        )

    def multiply_unit(self, unit: Unit, tokens: Sequence[Expr], sums: Buffer) -> None:
        """See `Decode.multiply_unit`."""
        shape = self.shape
        pairs = local((shape.tokens * _VECTOR * _PAIR,), "float16")
        turned = local((shape.tokens * _VECTOR * _PAIR,), "float16")
        unit_sums = local((shape.rows * shape.tokens * 2 * _PAIR,), "float16")
        for first in range(0, UNIT, _VECTOR):
            self._load_pairs(pairs, tokens, unit.number, first)
            self._turn(pairs, turned)
            for c in range(_VECTOR):
                for r in range(shape.rows):
                    total, difference = self._look_up(unit, r, first + c)
                    for b in range(shape.tokens):
                        out, column = (r * shape.tokens + b) * 2, b * _VECTOR + c
                        fresh = first + c == 0
                        self._accumulate(unit_sums, out, total, self._pair(pairs, column), fresh)
                        turned_pair = self._pair(turned, column)
                        self._accumulate(unit_sums, out + 1, difference, turned_pair, fresh)
        self._flush(unit_sums, sums)

    def _turn(self, pairs: Buffer, turned: Buffer) -> None:
        """Store (im x, -re x), or with one term (-im x, re x), for every pair."""
        zero = T.cast(T.float32(0), "float16")
        for i in range(self.shape.tokens * _VECTOR):
            pair = T.bind(self._pair(pairs, i))
            re, im = Shuffle([pair], [0]), Shuffle([pair], [1])
            both = [im, zero - re] if len(self.spec.terms) == 2 else [zero - im, re]
            store(turned, T.ramp(i * _PAIR, 1, _PAIR), Shuffle(both, [0, 1]))

    def _look_up(self, unit: Unit, r: int, column: int) -> tuple[Expr, Expr]:
        """Return both rows of a column's block, in the form of `prepare`."""
        by_term: list[Any] = [None] * len(self.spec.terms)
        for slot, (term, first, stages) in enumerate(self.weights.slots):
            width = 2 * stages
            word, inside = divmod(column, 32 // width)
            bits = unit.words[unit.at(r) + term * self.spec.stages + first + word]
            index = _extract(bits, width * inside, (1 << width) - 1, 1)
            base = ((self._first + r) * self._slots + slot) * _ENTRIES
            # The number of a pair, in a form that TVM leaves as it is: so it sees whole pairs.
            entry = T.cast(T.cast(base, "uint32") + index, "int32")
            found = self._table[T.ramp(entry * _PAIR, 1, _PAIR)]
            by_term[term] = found if by_term[term] is None else by_term[term] + found
        # Not bound to names, which TVM replaces by what they stand for, loads and all.
        values = local((len(by_term) * _PAIR,), "float16")
        for i, value in enumerate(by_term):
            store(values, T.ramp(i * _PAIR, 1, _PAIR), value)
        first = self._pair(values, 0)
        if len(by_term) == 1:
            return first, first
        return first + self._pair(values, 1), first - self._pair(values, 1)


class BlocksDecode(_HalfDecode):
    """One table of 2x2 blocks in float16 for a thread group."""

    def prepare(self, block: Expr, team: Expr, thread: Expr, rows: Sequence[Expr]) -> None:
        """See `Decode.prepare`."""
        shape, weights = self.shape, self.weights
        entries, copies = block_entries(self.spec), shape.copies
        self._table = shared((entries * copies * _BLOCK,), "float16")
        self._copy = T.bind(T.cast(T.bitwise_and(thread, copies - 1), "uint32"))
        row = T.bind(T.min(block * shape.group_rows, self.spec.n - 1))
        self._powers = [power_of_two(weights, row)] * shape.rows
        scale_row = T.bind(weights.scale_row(row))
        inverse = T.bind(inverse_power(self._powers[0]))
        width = 2 * self.spec.stages

        def entry(number: Expr) -> None:
            code = T.bind(T.cast(number, "uint32"))
            parts = [
                slot_value(weights, slot, code, slot * width, scale_row)
                for slot in range(len(weights.slots))
            ]
            values = local((_BLOCK,))
            weights.block_of(parts, values)
            scaled = local((_BLOCK,))
            for i in range(_BLOCK):
                store(scaled, i, values[i] * inverse)
            for copy in range(copies):  # neighbours write to different banks
                at = number * copies + T.bitwise_and(number + copy, copies - 1)
                _store_vector(self._table, at, [scaled[i] for i in range(_BLOCK)])

        threads = shape.teams * shape.threads
        strided(entries, team * shape.threads + thread, threads, entry)

    def multiply_unit(self, unit: Unit, tokens: Sequence[Expr], sums: Buffer) -> None:
        """See `Decode.multiply_unit`."""
        shape = self.shape
        pairs = local((shape.tokens * _VECTOR * _PAIR,), "float16")
        unit_sums = local((shape.rows * shape.tokens * 2 * _PAIR,), "float16")
        indices = [self._indices(unit.words, unit.at(r)) for r in range(shape.rows)]
        for first in range(0, UNIT, _VECTOR):
            self._load_pairs(pairs, tokens, unit.number, first)
            for c in range(_VECTOR):
                for r in range(shape.rows):
                    found = T.bind(self._look_up(*indices[r][first + c]))
                    for half in range(2):
                        row = Shuffle([found], [2 * half, 2 * half + 1])
                        for b in range(shape.tokens):
                            pair = self._pair(pairs, b * _VECTOR + c)
                            out = (r * shape.tokens + b) * 2 + half
                            self._accumulate(unit_sums, out, row, pair, first + c == 0)
        self._flush(unit_sums, sums)

    def _indices(self, words: Buffer, at: int) -> list[tuple[Expr, int]]:
        """Return for every column of a unit a word and the bit where all its codes begin."""
        stages = self.spec.stages
        width = 2 * stages
        per = 32 // width
        if len(self.spec.terms) == 1:
            return [(words[at + c // per], width * (c % per)) for c in range(UNIT)]
        # Even columns of both terms in one word, odd ones in another.
        low = sum(((1 << width) - 1) << 2 * width * i for i in range(per // 2))
        keep, other = T.uint32(low), T.uint32(low ^ 0xFFFFFFFF)
        by = T.uint32(width)
        merged = []
        for i in range(stages):
            u, w = words[at + i], words[at + stages + i]
            even = T.bitwise_and(u, keep) | T.bitwise_and(T.shift_left(w, by), other)
            odd = T.bitwise_and(T.shift_right(u, by), keep) | T.bitwise_and(w, other)
            merged.append((T.bind(even), T.bind(odd)))
        return [(merged[c // per][c % 2], 2 * width * (c % per // 2)) for c in range(UNIT)]

    def _look_up(self, word: Expr, bit: int) -> Expr:
        copies = self.shape.copies
        index = _extract(word, bit, block_entries(self.spec) - 1, copies)
        # An or, which GPUs do together with the and before it.
        index = T.cast(T.bitwise_or(index, self._copy), "int32")
        return self._table[T.ramp(index * _BLOCK, 1, _BLOCK)]


def _extract(word: Expr, bit: int, mask: int, times: int) -> Expr:
    """Return ``times`` the value of the bits of ``mask`` from ``bit`` on, in two operations."""
    up = times.bit_length() - 1 - bit
    by = T.uint32(abs(up))
    moved = word if up == 0 else T.shift_left(word, by) if up > 0 else T.shift_right(word, by)
    return T.bitwise_and(moved, T.uint32(mask * times))


def _store_vector(buffer: Buffer, number: Expr, values: Sequence[Any]) -> None:
    """Store the ``number``-th vector of a buffer, rounded to float16."""
    lanes = len(values)
    halves = [T.cast(value, "float16") for value in values]
    store(buffer, T.ramp(number * lanes, 1, lanes), Shuffle(halves, list(range(lanes))))


def slot_value(
    weights: Weights, slot: int, code: Expr, bit: int, scale_row: Expr
) -> tuple[Expr, Expr]:
    """Return both parts of the sum of a slot's stages, whose bits begin at ``bit`` of ``code``."""
    term, first, stages = weights.slots[slot]
    sums = local((2,))
    for t in range(stages):
        plane = term * weights.spec.stages + first + t
        bits = [
            T.reinterpret("uint32", weights.scales[scale_row, 0, plane, axis]) for axis in range(2)
        ]
        for axis, value in enumerate(decode_code(code, bit + 2 * t, *bits)):
            store(sums, axis, sums[axis] + value if t else value)
    return sums[0], sums[1]


def power_of_two(weights: Weights, row: Expr) -> Expr:
    """Return the bits of a float32 power of two that is at least the sum of a row's scales."""
    scale_row = T.bind(weights.scale_row(row))
    largest: Any = T.uint32(0)
    for plane in range(weights.planes):
        for axis in range(2):
            bits = T.reinterpret("uint32", weights.scales[scale_row, 0, plane, axis])
            largest = T.max(largest, T.bitwise_and(bits, T.uint32(_EXPONENT)))
    # Every scale is below twice its leading bit's value.
    more = (2 * weights.planes - 1).bit_length()
    return T.bind(largest + T.uint32(more << _MANTISSA_BITS))


def inverse_power(power: Expr) -> Expr:
    """Return the float32 1 / p of a power of two given by its bits."""
    return T.reinterpret("float32", T.uint32(254 << _MANTISSA_BITS) - power)
