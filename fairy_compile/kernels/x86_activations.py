"""TIR of the int8 activation contract on x86: quantised activations as the kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.op import ACT_GROUP, PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

_LANES = 16  # floats handled at a time; LLVM splits them where vectors are shorter


@dataclass(frozen=True)
class Tokens:
    """Rows of x that are multiplied together: ``count`` of them from row ``first`` on."""

    first: Expr | int
    count: Expr | int


class Activations:
    """Scratch buffers of quantised activations, and the code that fills them.

    - ``q`` int32, four int8 activations of a column block in a word;
    - ``scale`` float32, the scale of a group of 128 columns;
    - ``sum`` int32, the sum of the q of a *flush*: the columns between two changes of scale, 64 or
      128, see `CodebookFunction`.

    The scratch of a block of tokens begins where that of the rows before it ends, and interleaves
    the block's tokens, so that what a step reads is contiguous: [item][token][re, im].
    """

    def __init__(self, spec: PhaseSpec, rows: Expr | int, flush: int) -> None:
        self.m, self.rows, self.flush = spec.m, rows, flush
        self.groups = -(-spec.m // ACT_GROUP)
        self._blocks = self.groups * ACT_GROUP // BLOCK
        self.flushes = self.groups * ACT_GROUP // flush
        self._q = T.alloc_buffer((2 * rows * self._blocks,), "int32")
        self._scale = T.alloc_buffer((2 * rows * self.groups,), "float32")
        self._sum = T.alloc_buffer((2 * rows * self.flushes,), "int32")

    def word(self, tokens: Tokens, block: Expr, lane: int, half: int) -> Expr:
        """Return the activations of column block ``block``; half 0 is re and 1 im."""
        return self._q[_slot(tokens, self._blocks, block, lane, half)]

    def sum(self, tokens: Tokens, flush: Expr, lane: int, half: int) -> Expr:
        """Return the sum of the activations of a flush."""
        return self._sum[_slot(tokens, self.flushes, flush, lane, half)]

    def scale(self, tokens: Tokens, flush: Expr, lane: int, half: int) -> Expr:
        """Return the scale of the group that a flush is in."""
        group = T.floordiv(flush, ACT_GROUP // self.flush)
        return self._scale[_slot(tokens, self.groups, group, lane, half)]

    def quantize_row(self, x: Buffer) -> None:
        """Quantise the only row of x."""
        self._quantize(x, 0, Tokens(0, 1), 0)

    def quantize_rows(self, x: Buffer, tokens: int) -> None:
        """Quantise all rows of x: blocks of ``tokens``, and blocks of one for the rows left."""
        with T.parallel(0, self.rows) as row:
            whole = T.floordiv(self.rows, tokens) * tokens
            lane = T.bind(T.if_then_else(row < whole, T.floormod(row, tokens), 0))
            count = T.bind(T.if_then_else(row < whole, T.int64(tokens), T.int64(1)))
            self._quantize(x, row, Tokens(T.bind(row - lane), count), lane)

    def _quantize(self, x: Buffer, row: Expr, tokens: Tokens, lane: Expr) -> None:
        """Quantise a row exactly as `quantize_activations` defines."""
        group_blocks, group_flushes = ACT_GROUP // BLOCK, ACT_GROUP // self.flush
        values = T.alloc_buffer((ACT_GROUP,), "float32")
        words = T.alloc_buffer((group_blocks,), "int32")
        peak = T.alloc_buffer((1,), "float32")
        with T.serial(0, 2) as half, T.serial(0, self.groups) as group:
            self._copy_group(values, x, row, half, group)
            vectors = [values[span(i * _LANES, _LANES)] for i in range(ACT_GROUP // _LANES)]
            store(peak, 0, _reduce("fmax", "float32", [T.abs(v) for v in vectors]))
            at = _slot(tokens, self.groups, group, lane, half)
            store(self._scale, at, peak[0] * T.float32(1 / 127))
            inverse = T.if_then_else(peak[0] > T.float32(0), T.float32(127) / peak[0], T.float32(0))
            inverse = T.broadcast(T.bind(inverse), _LANES)
            quantized = []
            for i, vector in enumerate(vectors):
                # nearbyint rounds ties to even, as rint does.
                q = T.bind(T.cast(T.nearbyint(vector * inverse), f"int32x{_LANES}"))
                four = T.reinterpret(f"int32x{_LANES // BLOCK}", T.cast(q, f"int8x{_LANES}"))
                store(words, span(i * (_LANES // BLOCK), _LANES // BLOCK), four)
                quantized.append(q)
            with T.serial(0, group_blocks) as i:
                at = _slot(tokens, self._blocks, group * group_blocks + i, lane, half)
                store(self._q, at, words[i])
            per_flush = len(quantized) // group_flushes
            for f in range(group_flushes):
                total = _reduce("add", "int32", quantized[f * per_flush : (f + 1) * per_flush])
                at = _slot(tokens, self.flushes, group * group_flushes + f, lane, half)
                store(self._sum, at, total)

    def _copy_group(self, values: Buffer, x: Buffer, row: Expr, half: Expr, group: Expr) -> None:
        """Copy a group of half a row of x, with zeros past the end of the half."""
        whole, rest = divmod(self.m, ACT_GROUP)
        first = T.bind(half * self.m + group * ACT_GROUP)

        def copy_whole() -> None:
            with T.serial(0, ACT_GROUP // _LANES) as i:
                at = i * _LANES
                store(values, span(at, _LANES), x[row, span(first + at, _LANES)])

        if not rest:
            copy_whole()
            return
        with T.If(group < whole):
            with T.Then():
                copy_whole()
            with T.Else(), T.serial(0, ACT_GROUP) as i:
                store(values, i, T.if_then_else(i < rest, x[row, first + i], T.float32(0)))


def span(first: Expr | int, lanes: int) -> Expr:
    """Return the index of ``lanes`` consecutive elements."""
    return T.ramp(first, 1, lanes)


def store(buffer: Buffer, index: Any, value: Expr) -> None:
    """Store to ``buffer[index]``; a tuple has one index for each dimension."""
    T.buffer_store(buffer, value, list(index) if isinstance(index, tuple) else [index])


def _slot(tokens: Tokens, per_token: int, item: Expr, lane: Expr | int, half: Expr | int) -> Expr:
    """Return the scratch index of an item of the token ``lane`` of a block."""
    return (tokens.first * per_token + item * tokens.count + lane) * 2 + half


def _reduce(kind: str, dtype: str, vectors: Sequence[Expr]) -> Expr:
    """Return the ``fmax`` or sum (``add``) of all lanes of all vectors."""
    total, *rest = vectors
    for vector in rest:
        total = T.max(total, vector) if kind == "fmax" else total + vector
    return T.call_llvm_pure_intrin(dtype, f"llvm.vector.reduce.{kind}", T.bind(total))
