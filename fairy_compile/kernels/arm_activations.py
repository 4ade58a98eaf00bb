"""TIR of the int8 and int16 activation contracts on ARM: activations as the kernel reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tvm.tirx.script import builder as T

from fairy_compile.config import ActContract
from fairy_compile.kernels.arm_layout import BLOCK
from fairy_compile.kernels.x86_activations import (
    DIGITS,
    BlockedActivations,
    QuantizedGroup,
    Tokens,
    copy_group,
    span,
    store,
)
from fairy_compile.op import ACT_GROUP, ACT_LEVELS, PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

Form = Literal["halves", "conjugate", "twice"]
"""What a word of activations is stored with, see `Activations`."""

_LANES = 16  # floats handled at a time; LLVM splits them into vectors of four


class Activations(BlockedActivations):
    """Scratch buffers of quantised activations, and the code that fills them.

    - ``q`` int64, one digit of the eight activations of a column block in a word;
    - ``scale`` float32, the scale of a group of 128 columns.

    The scratch of a block of tokens begins where that of the rows before it ends, and interleaves
    the block's tokens, digits and the halves of x: [item][token][digit][re, im]. Of ``q``, the last
    are the sixteen bytes that smmla multiplies with. Their other forms are

    - ``conjugate``: [re, im, re, -im];
    - ``twice``: [re, re, im, im], two vectors that meet two rows each. A plain load is cheaper than
      one that repeats what it loads, which takes a vector pipe, too.
    """

    def __init__(self, spec: PhaseSpec, rows: Expr | int, form: Form = "halves") -> None:
        self.m, self.rows, self.form = spec.m, rows, form
        self.act, self.digits = spec.act, DIGITS[spec.act]
        self._words = 2 if form == "halves" else 4  # of q, for a column block, token and digit
        self.groups = -(-spec.m // ACT_GROUP)
        self._blocks = self.groups * ACT_GROUP // BLOCK
        self._q = T.alloc_buffer((self._words * self.digits * rows * self._blocks,), "int64")
        self._scale = T.alloc_buffer((2 * rows * self.groups,), "float32")

    def half(self, tokens: Tokens, block: Expr, lane: int, digit: int, half: int) -> Expr:
        """Return int8x8: a digit of the activations of a column block; half 0 is re and 1 im."""
        return T.reinterpret("int8x8", self._q[self._word(tokens, block, lane, digit) + half])

    def half_twice(self, tokens: Tokens, block: Expr, lane: int, digit: int, half: int) -> Expr:
        """Return int8x16: a digit of the activations of a column block, for two rows."""
        first = self._word(tokens, block, lane, digit)
        if self.form == "twice":
            words = self._q[span(first + 2 * half, 2)]
        else:
            words = T.broadcast(self._q[first + half], 2)
        return T.reinterpret("int8x16", words)

    def both_halves(
        self, tokens: Tokens, block: Expr, lane: int, digit: int, conjugate: bool
    ) -> Expr:
        """Return int8x16: a digit of the activations of a column block, re then im or -im."""
        first = self._word(tokens, block, lane, digit) + (2 if conjugate else 0)
        return T.reinterpret("int8x16", self._q[span(first, 2)])

    def scale(self, tokens: Tokens, group: Expr, lane: int, half: int) -> Expr:
        """Return the scale of a group."""
        return self._scale[_slot(tokens, self.groups, group, lane) * 2 + half]

    def both_scales(self, tokens: Tokens, group: Expr, lane: int) -> Expr:
        """Return float32x4: the scales of the halves of a group, twice."""
        first = _slot(tokens, self.groups, group, lane) * 2
        pair = T.reinterpret("int64", self._scale[span(first, 2)])
        return T.reinterpret("float32x4", T.broadcast(pair, 2))

    def _word(self, tokens: Tokens, block: Expr, lane: Expr | int, digit: int) -> Expr:
        """Return the index of the first word of a column block, token and digit."""
        return (_slot(tokens, self._blocks, block, lane) * self.digits + digit) * self._words

    def _quantize(self, x: Buffer, row: Expr, tokens: Tokens, lane: Expr | int) -> None:
        """Quantise a row exactly as `quantize_activations` defines."""
        values = T.alloc_buffer((ACT_GROUP,), "float32")
        levels = ACT_LEVELS[self.act]
        with T.serial(0, 2) as half, T.serial(0, self.groups) as group:
            copy_group(values, x, self.m, row, half, group)
            vectors = [values[span(i * _LANES, _LANES)] for i in range(ACT_GROUP // _LANES)]
            peak = T.bind(_peak(vectors))
            at = _slot(tokens, self.groups, group, lane) * 2 + half
            scale = peak * T.float32(1 / levels)
            store(self._scale, at, scale)
            inverse = T.if_then_else(peak > T.float32(0), T.float32(levels) / peak, T.float32(0))
            inverse = T.broadcast(T.bind(inverse), _LANES)
            # nearbyint rounds ties to even, as rint does.
            q = [T.bind(T.cast(T.nearbyint(v * inverse), f"int32x{_LANES}")) for v in vectors]
            self._store_group(QuantizedGroup(q, scale), tokens, lane, half, group)

    def _store_group(
        self, quantized: QuantizedGroup, tokens: Tokens, lane: Expr | int, half: Expr, group: Expr
    ) -> None:
        group_blocks = ACT_GROUP // BLOCK
        words = _words(quantized, self.act)
        if self.form == "conjugate":
            # Digits of -q: a low digit of -128 has no negative.
            sign = T.broadcast(T.bind(1 - 2 * T.cast(half, "int32")), _LANES)
            signed = [T.bind(q * sign) for q in quantized.q]
            conjugates = _words(QuantizedGroup(signed, quantized.scale), self.act)
        with T.serial(0, group_blocks) as i:
            for digit in range(self.digits):
                first = self._word(tokens, group * group_blocks + i, lane, digit)
                if self.form == "twice":
                    twice = T.broadcast(words[digit][i], 2)
                    store(self._q, span(first + 2 * half, 2), twice)
                else:
                    store(self._q, first + half, words[digit][i])
                if self.form == "conjugate":
                    store(self._q, first + 2 + half, conjugates[digit][i])


def _peak(vectors: list[Expr]) -> Expr:
    """Return the largest magnitude in the vectors."""
    largest = T.abs(vectors[0])
    for vector in vectors[1:]:
        # fmaxnm; T.max would become a comparison and a select.
        pair = (largest, T.abs(vector))
        largest = T.bind(T.call_llvm_pure_intrin(f"float32x{_LANES}", "llvm.maxnum", *pair))
    return T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", T.bind(largest))


def _words(quantized: QuantizedGroup, act: ActContract) -> list[Buffer]:
    """Return [digit] int64 (blocks of the group,): eight bytes of a column block in a word."""
    per_vector = _LANES // BLOCK
    words = []
    for vectors in quantized.digits(act):
        words.append(T.alloc_buffer((ACT_GROUP // BLOCK,), "int64"))
        for i, vector in enumerate(vectors):
            packed = T.reinterpret(f"int64x{per_vector}", vector)
            store(words[-1], span(i * per_vector, per_vector), packed)
    return words


def _slot(tokens: Tokens, per_token: int, item: Expr, lane: Expr | int) -> Expr:
    """Return the place of an item of the token ``lane`` of a block."""
    return tokens.first * per_token + item * tokens.count + lane
