"""TIR of the int8 activation contract on ARM: quantised activations as the kernel reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.arm_layout import BLOCK
from fairy_compile.kernels.x86_activations import Tokens, span, store
from fairy_compile.op import ACT_GROUP, PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

_LANES = 16  # floats handled at a time; LLVM splits them into vectors of four


class Activations:
    """Scratch buffers of quantised activations, and the code that fills them.

    - ``q`` int64, eight int8 activations of a column block in a word;
    - ``scale`` float32, the scale of a group of 128 columns.

    The scratch of a block of tokens begins where that of the rows before it ends, and interleaves
    the block's tokens and the halves of x: [item][token][re, im]. The sixteen bytes of a column
    block and token are what smmla multiplies with.
    """

    def __init__(self, spec: PhaseSpec, rows: Expr | int) -> None:
        self.m, self.rows = spec.m, rows
        self.groups = -(-spec.m // ACT_GROUP)
        self._blocks = self.groups * ACT_GROUP // BLOCK
        self._q = T.alloc_buffer((2 * rows * self._blocks,), "int64")
        self._scale = T.alloc_buffer((2 * rows * self.groups,), "float32")

    def half(self, tokens: Tokens, block: Expr, lane: int, half: int) -> Expr:
        """Return int8x8: the activations of a column block; half 0 is re and 1 im."""
        return T.reinterpret("int8x8", self._q[_slot(tokens, self._blocks, block, lane, half)])

    def half_twice(self, tokens: Tokens, block: Expr, lane: int, half: int) -> Expr:
        """Return int8x16: the activations of a column block, for two rows."""
        word = self._q[_slot(tokens, self._blocks, block, lane, half)]
        return T.reinterpret("int8x16", T.broadcast(word, 2))

    def both_halves(self, tokens: Tokens, block: Expr, lane: int) -> Expr:
        """Return int8x16: the activations of a column block, re then im."""
        words = self._q[span(_slot(tokens, self._blocks, block, lane, 0), 2)]
        return T.reinterpret("int8x16", words)

    def scale(self, tokens: Tokens, group: Expr, lane: int, half: int) -> Expr:
        """Return the scale of a group."""
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

    def _quantize(self, x: Buffer, row: Expr, tokens: Tokens, lane: Expr | int) -> None:
        """Quantise a row exactly as `quantize_activations` defines."""
        group_blocks, per_vector = ACT_GROUP // BLOCK, _LANES // BLOCK
        values = T.alloc_buffer((ACT_GROUP,), "float32")
        words = T.alloc_buffer((group_blocks,), "int64")
        with T.serial(0, 2) as half, T.serial(0, self.groups) as group:
            self._copy_group(values, x, row, half, group)
            vectors = [values[span(i * _LANES, _LANES)] for i in range(ACT_GROUP // _LANES)]
            peak = T.bind(_peak(vectors))
            at = _slot(tokens, self.groups, group, lane, half)
            store(self._scale, at, peak * T.float32(1 / 127))
            inverse = T.if_then_else(peak > T.float32(0), T.float32(127) / peak, T.float32(0))
            inverse = T.broadcast(T.bind(inverse), _LANES)
            for i, vector in enumerate(vectors):
                # nearbyint rounds ties to even, as rint does.
                q = T.cast(T.nearbyint(vector * inverse), f"int32x{_LANES}")
                packed = T.reinterpret(f"int64x{per_vector}", T.cast(q, f"int8x{_LANES}"))
                store(words, span(i * per_vector, per_vector), packed)
            with T.serial(0, group_blocks) as i:
                block = group * group_blocks + i
                store(self._q, _slot(tokens, self._blocks, block, lane, half), words[i])

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


def _peak(vectors: list[Expr]) -> Expr:
    """Return the largest magnitude in the vectors."""
    largest = T.abs(vectors[0])
    for vector in vectors[1:]:
        # fmaxnm; T.max would become a comparison and a select.
        pair = (largest, T.abs(vector))
        largest = T.bind(T.call_llvm_pure_intrin(f"float32x{_LANES}", "llvm.maxnum", *pair))
    return T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", T.bind(largest))


def _slot(tokens: Tokens, per_token: int, item: Expr, lane: Expr | int, half: Expr | int) -> Expr:
    """Return the scratch index of an item of the token ``lane`` of a block."""
    return (tokens.first * per_token + item * tokens.count + lane) * 2 + half
