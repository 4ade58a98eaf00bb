"""TIR of the x86 phase GEMM for many tokens, without AMX: dot products with decoded panels.

    for each row tile (in parallel):
        for each block of columns, for each set of panels (see `x86_panels`):
            decode the panels to L1
            for each block of tokens, for each flush of the columns, for each half of x:
                sums[token][Re y, Im y] = products of the half with two panels
                out[token][Re y, Im y] += weight scale * activation scale * sums

What is summed in registers is two vectors of weights times the tokens of a block: Re y and Im y
where a vector holds a column block, and one of them after the other where it takes two vectors
(mode ``words``). A token's activations of the column block, repeated over a vector, meet both.
AVX2 has pmaddubsw and pmaddwd in place of vpdpbusd; words need pmaddwd alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import (
    DIGITS,
    GroupQuantizer,
    dot,
    join_digits,
    reduce,
    span,
    store,
)
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.kernels.x86_outputs import RowTileOutputs
from fairy_compile.kernels.x86_panel_layout import MIN_TOKENS, Panel
from fairy_compile.kernels.x86_panels import PanelMultiply, Panels
from fairy_compile.op import ACT_GROUP, PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

    from fairy_compile.kernels.x86 import Isa

_HALVES = 2
_LANES = 16  # floats that are quantised at a time


class DotMultiply(PanelMultiply):
    """Multiplies by dot products."""

    @property
    def tokens(self) -> int:
        """Rows of x in a block: as many as keep their sums in registers."""
        return self.isa.block // self.digits

    def usable(self) -> Expr:
        """Return whether there are enough tokens."""
        return self.rows >= MIN_TOKENS

    def emit(self) -> None:
        """Emit quantisation and multiplication."""
        panels, lanes = self.panels, self.isa.rows
        self.activations = PanelActivations(self.spec, self.isa, self.rows, self.tokens, panels)
        self.activations.quantize(self.x)
        tokens = self.activations.rows
        with T.parallel(0, int(self.arrays["codes"].shape[0])) as tile:
            outputs = RowTileOutputs(self.spec, lanes, self.y, tile)
            panels.allocate()
            self.out = T.alloc_buffer((tokens * 2 * lanes,), "float32")
            with T.serial(0, tokens * 2) as i:
                store(self.out, span(i * lanes, lanes), T.broadcast(T.float32(0), lanes))
            panels.decode_all(tile, lambda *panel: self._multiply_all_blocks(tile, *panel))
            with T.serial(0, self.rows) as token:
                at = T.bind(token * 2 * lanes)
                outputs.store(token, (self.out, self.out), (at, at + lanes))

    def _multiply_all_blocks(self, tile: Expr, panel: Panel, first: Expr, count: Expr) -> None:
        with T.serial(0, self.activations.blocks) as block:
            self._multiply_block(tile, panel, first, count, block)

    def _multiply_block(
        self, tile: Expr, panel: Panel, first: Expr, count: Expr, block: Expr
    ) -> None:
        together = 2 // self.panels.vectors
        with T.serial(0, count) as i:
            flush = T.bind(first + i)
            scales = self.panels.scales(tile, panel, flush)
            for half in range(_HALVES):
                for axis in range(0, 2, together):
                    axes = range(axis, axis + together)
                    sums = self._sum(i, flush, half, axes, block)
                    self._scale_sums(scales, flush, half, axes, block, sums)

    def _sum(
        self, i: Expr, flush: Expr, half: int, axes: range, block: Expr
    ) -> list[list[list[Buffer]]]:
        """Return [token][axis, vector][digit] sums of a flush, from the starts on."""
        panels, digits = self.panels, self.digits
        places = [(axis, vector) for axis in axes for vector in range(panels.vectors)]
        sums = [
            [[self._new_sum() for _ in range(digits)] for _ in places] for _ in range(self.tokens)
        ]
        for t in range(self.tokens):
            start = self.activations.start(flush, half, block, t)
            for of_place in sums[t]:
                for digit in range(digits):
                    value = start if digit == 0 else T.int32(0)
                    store(
                        of_place[digit], span(0, self.isa.rows), T.broadcast(value, self.isa.rows)
                    )
        with T.serial(0, panels.flush_blocks) as b:
            weights = [
                T.bind(
                    panels.buffer[
                        2 * half + axis, span(T.bind(panels.at(i, b, vector)), panels.lanes)
                    ]
                )
                for axis, vector in places
            ]
            for t in range(self.tokens):
                for digit in range(digits):
                    word = self.activations.word(flush, b, half, digit, block, t)
                    for weight, of_place in zip(weights, sums[t], strict=True):
                        self._add_dot(of_place[digit], weight, word)
        return sums

    def _new_sum(self) -> Buffer:
        return T.alloc_buffer((self.isa.rows,), "int32")

    def _add_dot(self, total: Buffer, weight: Expr, word: Expr) -> None:
        lanes = self.isa.rows
        at = span(0, lanes)
        if self.panels.words:
            products = T.call_llvm_pure_intrin(
                f"int32x{lanes}", "llvm.x86.avx2.pmadd.wd", weight, word
            )
            store(total, at, total[at] + products)
            return
        store(total, at, dot(self.isa, total[at], weight, word))

    def _scale_sums(
        self,
        scales: list[Expr],
        flush: Expr,
        half: int,
        axes: range,
        block: Expr,
        sums: list[list[list[Buffer]]],
    ) -> None:
        """Add a flush's sums, scaled, to the outputs of a block of tokens."""
        lanes, vectors = self.isa.rows, self.panels.vectors
        for t in range(self.tokens):
            activation = T.broadcast(self.activations.scale(flush, half, block, t), lanes)
            for number, axis in enumerate(axes):
                own = sums[t][number * vectors : (number + 1) * vectors]
                value = self._join([[d[span(0, lanes)] for d in digits] for digits in own])
                at = span(T.bind(((block * self.tokens + t) * 2 + axis) * lanes), lanes)
                scale = scales[half ^ axis] * activation
                store(self.out, at, self.out[at] + value * scale)

    def _join(self, sums: list[list[Expr]]) -> Expr:
        """Return float32 sums of the rows from those of [vector][digit]."""
        lanes = self.isa.rows
        kind = f"float32x{lanes}"
        if not self.panels.words:
            return T.cast(join_digits(sums[0], lanes), kind)
        # Entries of 16 bits times digits reach 2^29; 256 times as much would pass 2^31.
        low, *high = (
            T.cast(_add_neighbours(list(two), lanes), kind) for two in zip(*sums, strict=True)
        )
        return low + high[0] * T.broadcast(T.float32(256), lanes) if high else low


def _add_neighbours(two: list[Expr], lanes: int) -> Expr:
    """Return the sums of neighbours of two int32 vectors, of each four the first and the second's.

    [a0 a1 a2 a3 | ...], [b0 b1 b2 b3 | ...] -> [a0 + a1, a2 + a3, b0 + b1, b2 + b3 | ...]
    """
    order = [
        lane + 2 * i + which * lanes
        for lane in range(0, lanes, 4)
        for which in (0, 1)
        for i in (0, 1)
    ]
    first, second = (T.bind(v) for v in two)
    even = T.Shuffle([first, second], order)
    return even + T.Shuffle([first, second], [i + 1 for i in order])


class PanelActivations:
    """Scratch buffers of the activations of all tokens, in blocks of ``tokens`` rows of x.

    - ``q``: for a column block of four the four activations, bytes in an int32 or, where panels are
      int16, int16 in an int64: [block of tokens][half of x][digit][column block][token];
    - float32 scales [block of tokens][half of x][group of 128 columns][token];
    - int32 starts of sums [block of tokens][half of x][flush][token], where panels are unsigned:
      what takes their offset off.

    Rows past those of x are zeros.

    Attributes:
        blocks: blocks of tokens.
        rows: rows of x, rounded up to whole blocks.
        digits: of an activation.
    """

    def __init__(self, spec: PhaseSpec, isa: Isa, rows: Expr, tokens: int, panels: Panels) -> None:
        self._spec, self._isa, self._rows, self._tokens = spec, isa, rows, tokens
        self._panels = panels
        self.blocks = T.bind(T.floordiv(rows + (tokens - 1), tokens))
        self.rows = T.bind(self.blocks * tokens)
        self.digits = DIGITS[spec.act]
        self._groups = -(-spec.m // ACT_GROUP)
        self._columns = self._groups * ACT_GROUP // BLOCK
        self._word = "int64" if panels.words else "int32"
        self._q = T.alloc_buffer((_HALVES * self.digits * self._columns * self.rows,), self._word)
        self._scale = T.alloc_buffer((_HALVES * self._groups * self.rows,), "float32")
        if panels.offset:
            self._start = T.alloc_buffer((_HALVES * panels.flushes * self.rows,), "int32")

    def word(
        self, flush: Expr, column: Expr, half: int, digit: int, block: Expr, token: int
    ) -> Expr:
        """Return a digit of the activations of a column block of a flush, for every row."""
        column = flush * self._panels.flush_blocks + column
        word = self._q[self._q_at(block, half, digit, column, token)]
        lanes = self._isa.width // (8 if self._panels.words else 4)
        kind = f"int16x{self._panels.lanes}" if self._panels.words else f"int8x{self._isa.width}"
        return T.bind(T.reinterpret(kind, T.broadcast(word, lanes)))

    def scale(self, flush: Expr, half: int, block: Expr, token: int) -> Expr:
        """Return a token's scale."""
        group = T.floordiv(flush, ACT_GROUP // self._panels.flush)
        return self._scale[self._at(self._groups, block, half, group, token)]

    def start(self, flush: Expr, half: int, block: Expr, token: int) -> Expr:
        """Return what a sum over a flush starts from."""
        if not self._panels.offset:
            return T.int32(0)
        return self._start[self._at(self._panels.flushes, block, half, flush, token)]

    def quantize(self, x: Buffer) -> None:
        """Quantise all rows of x."""
        with T.parallel(0, self.rows) as row:
            block, token = (
                T.bind(T.floordiv(row, self._tokens)),
                T.bind(T.floormod(row, self._tokens)),
            )
            quantizer = GroupQuantizer(self._spec)
            words = [T.alloc_buffer((ACT_GROUP // BLOCK,), self._word) for _ in range(self.digits)]
            with (
                T.serial(0, _HALVES) as half,
                T.serial(0, self._groups) as group,
                T.If(row < self._rows),
            ):
                with T.Then():
                    quantized = quantizer.emit(x, row, half, group)
                    at = self._at(self._groups, block, half, group, token)
                    store(self._scale, at, quantized.scale)
                    for digit, vectors in enumerate(quantized.digits(self._spec.act)):
                        self._store_digit(block, half, group, token, digit, vectors, words[digit])
                    self._store_starts(block, half, group, token, quantized.q)
                with T.Else():
                    at = self._at(self._groups, block, half, group, token)
                    store(self._scale, at, T.float32(0))
                    zero = [T.broadcast(T.int8(0), _LANES)] * (ACT_GROUP // _LANES)
                    for digit in range(self.digits):
                        self._store_digit(block, half, group, token, digit, zero, words[digit])
                    self._store_starts(block, half, group, token, None)

    def _store_digit(
        self,
        block: Expr,
        half: Expr,
        group: Expr,
        token: Expr,
        digit: int,
        vectors: list[Expr],
        words: Buffer,
    ) -> None:
        """Store the int8 vectors of a group's columns, in order."""
        per_vector = _LANES // BLOCK
        for i, vector in enumerate(vectors):
            if self._panels.words:
                vector = T.cast(vector, f"int16x{_LANES}")
            four = T.reinterpret(f"{self._word}x{per_vector}", vector)
            store(words, span(i * per_vector, per_vector), four)
        group_blocks = ACT_GROUP // BLOCK
        with T.serial(0, group_blocks) as i:
            at = self._q_at(block, half, digit, group * group_blocks + i, token)
            store(self._q, at, words[i])

    def _store_starts(
        self, block: Expr, half: Expr, group: Expr, token: Expr, q: list[Expr] | None
    ) -> None:
        if not self._panels.offset:
            return
        flushes = ACT_GROUP // self._panels.flush
        per_flush = ACT_GROUP // _LANES // flushes
        for f in range(flushes):
            at = self._at(self._panels.flushes, block, half, group * flushes + f, token)
            value: Expr = T.int32(0)
            if q is not None:
                some = q[f * per_flush : (f + 1) * per_flush]
                value = reduce("add", "int32", some) * T.int32(-self._panels.offset)
            store(self._start, at, value)

    def _q_at(
        self, block: Expr, half: Expr | int, digit: int, column: Expr, token: Expr | int
    ) -> Expr:
        at = (block * _HALVES + half) * self.digits + digit
        return (at * self._columns + column) * self._tokens + token

    def _at(self, items: int, block: Expr, half: Expr | int, item: Expr, token: Expr | int) -> Expr:
        return ((block * _HALVES + half) * items + item) * self._tokens + token
