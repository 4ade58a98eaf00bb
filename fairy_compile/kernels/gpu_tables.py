"""Tables of weights in shared memory, for kernels that decode while they multiply.

The stages of a column lie in pairs of 4 adjacent bits (see `gpu_layout`), so there are 16 values of
a pair: the sums of its two stages. A thread group computes them once for each of its rows, or once
for each tile of columns that has scales of its own (`gpu_tile_tables`); from then on a code costs
an index and a load of two floats in place of some 20 integer operations. All threads that look at
once look into the 128 bytes of one table, which lie in different banks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import local, shared, store, strided
from fairy_compile.kernels.gpu_weights import Weights, decode_code

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

ENTRIES = 16
_PAIR = 2  # floats of an entry: real and imaginary part
# Codes of even and odd columns in a word.
_EVEN, _ODD = 0x33333333, 0xCCCCCCCC


def table_bytes(slots: int) -> int:
    """Return the shared memory of one table of ``slots`` pairs of stages."""
    return slots * ENTRIES * _PAIR * 4


def make_tables(weights: Weights, count: int) -> Tables:
    """Return the tables that take the fewest look-ups for a column."""
    one_stage = weights.spec.stages == 1 and len(weights.spec.terms) == 2
    return (BlockTables if one_stage else Tables)(weights, count)


class Tables:
    """Tables of a thread group, each of weights that share their scales.

    Args:
        weights: of the call.
        count: number of tables.
    """

    entry_floats = _PAIR

    def __init__(self, weights: Weights, count: int) -> None:
        self.weights, self.count = weights, count
        self._slot = ENTRIES * _PAIR
        self._table = len(weights.slots) * self._slot
        self._buffer = shared((count * self._table,))

    def fill(
        self, scales_of: Callable[[Expr], tuple[Expr, Expr]], thread: Expr, threads: int
    ) -> None:
        """Compute all entries; ThreadSync puts a barrier before the first look-up.

        Args:
            scales_of: scales_of(i) is the row and column of the scales of table i.
            thread: of the thread group, which has ``threads``.
        """

        def entry(number: Expr) -> None:
            table = T.bind(T.floordiv(number, ENTRIES))
            index = T.floormod(number, ENTRIES)
            code = T.bind(T.cast(index, "uint32"))
            scale_row, tile = map(T.bind, scales_of(table))
            self._fill_entry(table, index, code, lambda *of: self._bits(scale_row, tile, *of))

        strided(self.count * ENTRIES, thread, threads, entry)

    def _bits(self, row: Expr, tile: Expr, plane: int) -> list[Expr]:
        """Return the bits of a plane's two scales."""
        scales = self.weights.scales
        return [T.reinterpret("uint32", scales[row, tile, plane, axis]) for axis in range(2)]

    def _fill_entry(
        self, table: Expr, index: Expr, code: Expr, bits: Callable[[int], list[Expr]]
    ) -> None:
        for slot, (term, first, stages) in enumerate(self.weights.slots):
            sums = local((_PAIR,))
            for t in range(stages):
                plane = term * self.weights.spec.stages + first + t
                for axis, value in enumerate(decode_code(code, 2 * t, *bits(plane))):
                    store(sums, axis, sums[axis] + value if t else value)
            at = table * self._table + slot * self._slot + index * _PAIR
            for axis in range(2):
                store(self._buffer, at + axis, sums[axis])

    def combine(self, words: Buffer, at: int) -> None:
        """Prepare the words of a unit, from ``at`` on, for look-ups."""

    def block(self, words: Buffer, at: int, column: int, table: Expr, into: Buffer) -> None:
        """Store the 2x2 block of a column, see `Weights.block`, to ``into``.

        Args:
            words: of the slots, from ``at`` on, whose lowest bits are of the first of four columns.
            at: see ``words``.
            column: which of the four.
            table: to look into.
            into: four registers.
        """
        found = []
        for slot, (_, _, stages) in enumerate(self.weights.slots):
            bit = column * 2 * stages
            place = table * self._table + slot * self._slot
            found.append(self._look_up(words[at + slot], bit, (1 << 2 * stages) - 1, place))
        self.weights.block_of(found, into)

    def _look_up(self, word: Expr, bit: int, mask: int, place: Expr) -> tuple[Expr, ...]:
        """Return the floats of the entry that the bits from ``bit`` on name."""
        floats = self.entry_floats
        up = floats.bit_length() - 1
        # The index times the floats of an entry, in two operations.
        moved = word if bit == up else None
        if moved is None:
            by = T.uint32(abs(bit - up))
            moved = T.shift_right(word, by) if bit > up else T.shift_left(word, by)
        index = T.bitwise_and(moved, T.uint32(mask * floats))
        value = local((floats,))
        source = self._buffer[T.ramp(place + T.cast(index, "int32"), 1, floats)]
        store(value, T.ramp(0, 1, floats), source)
        return tuple(value[i] for i in range(floats))


class BlockTables(Tables):
    """Tables of whole 2x2 blocks, for U and W of one stage, whose codes have 16 values together.

    One look-up of four floats takes the place of two, and of the sums of U and W. Blocks of one
    table take 256 bytes, so that two of them share their banks.
    """

    entry_floats = 2 * _PAIR

    def _fill_entry(
        self, table: Expr, index: Expr, code: Expr, bits: Callable[[int], list[Expr]]
    ) -> None:
        values = [decode_code(code, 2 * plane, *bits(plane)) for plane in range(2)]
        block = local((self.entry_floats,))
        self.weights.block_of(values, block)
        at = table * self._table + index * self.entry_floats
        for i in range(self.entry_floats):
            store(self._buffer, at + i, block[i])

    def combine(self, words: Buffer, at: int) -> None:
        """Put the codes of U and W side by side: even columns in one word, odd ones in the other.

        From .. u3 u2 u1 u0 and .. w3 w2 w1 w0, of two bits each, to .. w2 u2 w0 u0 and
        .. w3 u3 w1 u1; what is of four columns stays in the same eight bits.
        """

        def masked(word: Expr, mask: int) -> Expr:
            return T.bitwise_and(word, T.uint32(mask))

        even = local((1,), "uint32")
        low = T.shift_left(masked(words[at + 1], _EVEN), T.uint32(2))
        store(even, 0, T.bitwise_or(masked(words[at], _EVEN), low))
        high = masked(T.shift_right(words[at], T.uint32(2)), _EVEN)
        store(words, at + 1, T.bitwise_or(high, masked(words[at + 1], _ODD)))
        store(words, at, even[0])

    def block(self, words: Buffer, at: int, column: int, table: Expr, into: Buffer) -> None:
        """See `Tables.block`."""
        word, bit = words[at + column % 2], column // 2 * 4
        found = self._look_up(word, bit, ENTRIES - 1, table * self._table)
        for i, value in enumerate(found):
            store(into, i, value)
