"""From packed words to entries of the real matrix, in registers.

A code is decoded with integer operations on the bits of its scales: bit 1 is the sign, bit 0 says
whether the value lies on the imaginary axis, where it clears the real part, else the imaginary one.
Terms and stages of a column are summed to the 2x2 block that real arithmetic multiplies with,

    [re y]    [Ur + Wr   Wi - Ui] [re x]
    [im y] += [Ui + Wi   Ur - Wr] [im x]

so that more rows of x cost four multiply-adds a column each, whatever T is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import local, store
from fairy_compile.kernels.gpu_layout import UNIT, row_tiles, units
from fairy_compile.kernels.gpu_rows import Stacked
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.phase import tile_shape

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer


class Weights:
    """The packed weight of one call inside a kernel, or of one expert of it.

    Attributes:
        planes: terms * T, the words of a unit.
        slots: (term, first stage, stages 1 or 2) of each group of adjacent bits.
        tiled: whether scales change along a row.
    """

    def __init__(self, spec: PhaseSpec, codes: Buffer | Stacked, scales: Buffer | Stacked) -> None:
        self.spec, self.codes, self.scales = spec, codes, scales
        self.planes = len(spec.terms) * spec.stages
        self.slots = [
            (k, t, min(2, spec.stages - t))
            for k in range(len(spec.terms))
            for t in range(0, spec.stages, 2)
        ]
        self.units = units(spec)
        self.tiled = spec.scale == "tile64"

    def scale_row(self, row: Expr) -> Expr:
        """Return the row tile of a complex row."""
        result: Any = None
        runs = self.spec.output_runs()
        for (first, rows, _), (tile, size) in zip(runs, row_tiles(self.spec), strict=True):
            own = T.int32(tile) if size >= rows else tile + T.floordiv(row - first, size)
            result = own if result is None else T.Select(row >= first, own, result)
        return result

    def load_scales(self, into: Buffer, at: int, row: Expr, unit: Expr) -> None:
        """Load the bits of a row's scales at a unit into 2 * planes registers from ``at`` on."""
        columns = tile_shape(self.spec.scale, self.spec.n, self.spec.m)[1]
        tile = T.floordiv(unit, columns // UNIT) if self.tiled else 0
        scale_row = T.bind(self.scale_row(row))
        for plane in range(self.planes):
            for axis in range(2):
                scale = self.scales[scale_row, tile, plane, axis]
                store(into, at + 2 * plane + axis, T.reinterpret("uint32", scale))

    def block(
        self, bits: Sequence[tuple[Expr, int]], scale: Buffer, scale_at: int, into: Buffer
    ) -> None:
        """Store the 2x2 block of a column to ``into``, row by row.

        Args:
            bits: of each slot, a word and the bit at which the column's codes begin.
            scale, scale_at: registers `load_scales` filled.
            into: four registers.
        """
        values = []
        for (k, first, stages), (word, start) in zip(self.slots, bits, strict=True):
            value: tuple[Any, Any] | None = None
            for t in range(stages):
                plane = k * self.spec.stages + first + t
                re, im = (scale[scale_at + 2 * plane + axis] for axis in range(2))
                found = decode_code(word, start + 2 * t, re, im)
                value = found if value is None else tuple(map(_add, value, found))
            values.append(value)
        self.block_of(values, into)

    def block_of(self, values: Sequence[tuple[Any, Any]], into: Buffer) -> None:
        """Store the 2x2 block of a column to ``into``, given both parts of every slot's sum."""
        sums: dict[int, tuple[Any, Any]] = {}
        for (k, _, _), value in zip(self.slots, values, strict=True):
            before = sums.get(k)
            sums[k] = value if before is None else tuple(map(_add, before, value))
        if len(sums) == 2:
            (ur, ui), (wr, wi) = self._parts(sums[0]), self._parts(sums[1])
            block = (ur + wr, wi - ui, ui + wi, ur - wr)
        else:
            wr, wi = self._parts(sums[0])
            block = (wr, wi, wi, -wr)
        for i, value in enumerate(block):
            store(into, i, value)

    @staticmethod
    def _parts(value: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return re and im as registers, since each is used twice."""
        registers = local((2,))
        for i in range(2):
            store(registers, i, value[i])
        return registers[0], registers[1]

    def feature(self, row: Expr) -> tuple[Expr, Expr]:
        """Return the output features of a complex row's real and imaginary part."""
        re: Any = None
        im: Any = None
        for first, rows, feature in self.spec.output_runs():
            own = row - first + feature
            re = own if re is None else T.Select(row >= first, own, re)
            im = own + rows if im is None else T.Select(row >= first, own + rows, im)
        return re, im


def decode_code(word: Expr, bit: int, re: Expr, im: Expr) -> tuple[Expr, Expr]:
    """Return both parts of a code's value; ``re`` and ``im`` are the bits of its scales."""
    to_sign = 30 - bit
    moved = T.shift_left(word, T.uint32(to_sign)) if to_sign else word
    sign = T.bitwise_and(moved, T.uint32(1 << 31))
    # Bit 0 in all bits: moved to the sign, which an arithmetic shift repeats.
    top = T.cast(T.shift_left(word, T.uint32(31 - bit)) if bit < 31 else word, "int32")
    imaginary = T.cast(T.shift_right(top, T.int32(31)), "uint32")
    real = T.bitwise_xor(imaginary, T.uint32(0xFFFFFFFF))
    return (
        _float(T.bitwise_and(T.bitwise_xor(re, sign), real)),
        _float(T.bitwise_and(T.bitwise_xor(im, sign), imaginary)),
    )


def _float(bits: Expr) -> Expr:
    return T.reinterpret("float32", bits)


def _add(a: Any, b: Any) -> Any:
    return a + b
