"""Tables of weights in shared memory, for kernels that decode while they multiply.

The stages of a column lie in pairs of 4 adjacent bits (see `gpu_layout`), so there are 16 values of
a pair: the sums of its two stages. A thread group computes them once for each of its rows; from
then on a code costs an index and a load of two floats in place of some 20 integer operations. All
threads of a team look into the 128 bytes of one table, which lie in different banks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import local, shared, store, strided
from fairy_compile.kernels.gpu_weights import Weights, decode_code

if TYPE_CHECKING:
    from tvm.ir import Expr

ENTRIES = 16
_PAIR = 2  # floats of an entry: real and imaginary part


def table_bytes(weights: Weights, rows: int) -> int:
    """Return the shared memory of the tables of ``rows`` complex matrix rows."""
    return rows * len(weights.slots) * ENTRIES * _PAIR * 4


class Tables:
    """Tables of the rows of a thread group.

    Args:
        weights: whose scales do not change along a row.
        rows: complex matrix rows of the thread group.
    """

    def __init__(self, weights: Weights, rows: int) -> None:
        self.weights, self.rows = weights, rows
        self._slot = ENTRIES * _PAIR
        self._row = len(weights.slots) * self._slot
        self._buffer = shared((rows * self._row,))

    def fill(self, matrix_row: Callable[[Expr], Expr], thread: Expr, threads: int) -> None:
        """Compute all entries; ThreadSync puts a barrier before the first look-up.

        Args:
            matrix_row: matrix_row(r) is the complex matrix row of the group's row r.
            thread: of the thread group, which has ``threads``.
        """
        weights, stages_all = self.weights, self.weights.spec.stages

        def entry(number: Expr) -> None:
            row = T.bind(T.floordiv(number, ENTRIES))
            index = T.floormod(number, ENTRIES)
            code = T.bind(T.cast(index, "uint32"))
            scale_row = T.bind(weights.scale_row(matrix_row(row)))
            for slot, (term, first, stages) in enumerate(weights.slots):
                sums = local((_PAIR,))
                for t in range(stages):
                    plane = term * stages_all + first + t
                    bits = [
                        T.reinterpret("uint32", weights.scales[scale_row, 0, plane, axis])
                        for axis in range(2)
                    ]
                    for axis, value in enumerate(decode_code(code, 2 * t, *bits)):
                        store(sums, axis, sums[axis] + value if t else value)
                at = row * self._row + slot * self._slot + index * _PAIR
                for axis in range(2):
                    store(self._buffer, at + axis, sums[axis])

        strided(self.rows * ENTRIES, thread, threads, entry)

    def look_up(self, word: Expr, bit: int, row: Expr, slot: int) -> tuple[Expr, Expr]:
        """Return both parts of the sum of a slot's stages, whose bits begin at ``bit``."""
        stages = self.weights.slots[slot][2]
        # The index times two, in two operations.
        moved = T.shift_right(word, T.uint32(bit - 1)) if bit else T.shift_left(word, T.uint32(1))
        index = T.bitwise_and(moved, T.uint32(((1 << 2 * stages) - 1) * _PAIR))
        at = row * self._row + slot * self._slot + T.cast(index, "int32")
        value = local((_PAIR,))
        store(value, T.ramp(0, 1, _PAIR), self._buffer[T.ramp(at, 1, _PAIR)])
        return value[0], value[1]
