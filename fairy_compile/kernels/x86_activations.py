"""TIR of the int8 and int16 activation contracts on x86: activations as the kernels read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.config import ActContract
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.op import ACT_GROUP, ACT_LEVELS, PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

    from fairy_compile.kernels.x86 import Isa

_LANES = 16  # floats handled at a time; LLVM splits them where vectors are shorter

DIGITS: dict[ActContract, int] = {"int8": 1, "int16": 2}
"""Signed bytes of an activation, q = sum of digit d times 256^d."""


@dataclass(frozen=True)
class Tokens:
    """Rows of x that are multiplied together: ``count`` of them from row ``first`` on."""

    first: Expr | int
    count: Expr | int


def each_block(rows: Expr | int, tokens: int, emit: Callable[[Tokens], None]) -> None:
    """Emit code for blocks of ``tokens`` of the ``rows`` of x, and blocks of one for those left."""
    if isinstance(rows, int):  # batch ``single``
        emit(Tokens(0, 1))
        return
    blocks = T.bind(T.floordiv(rows, tokens))
    with T.serial(0, blocks) as block:
        emit(Tokens(T.bind(block * tokens), tokens))
    if tokens > 1:
        with T.serial(0, rows - blocks * tokens) as left:
            emit(Tokens(T.bind(blocks * tokens + left), 1))


@dataclass(frozen=True)
class QuantizedGroup:
    """A group of 128 quantised activations: vectors of int32 q in column order, and their scale."""

    q: list[Expr]
    scale: Expr

    def digits(self, act: ActContract) -> list[list[Expr]]:
        """Return [digit][vector] int8; of two, the low one is -128 .. 127."""
        lanes = _LANES
        low = [T.cast(q, f"int8x{lanes}") for q in self.q]  # keeps the low byte
        if DIGITS[act] == 1:
            return [low]
        half, shift = T.broadcast(T.int32(128), lanes), T.broadcast(T.int32(8), lanes)
        high = [T.cast(T.shift_right(q + half, shift), f"int8x{lanes}") for q in self.q]
        return [low, high]


class GroupQuantizer:
    """Emits the quantisation of single groups, exactly as `quantize_activations` defines it."""

    def __init__(self, spec: PhaseSpec) -> None:
        self._m, self._levels = spec.m, ACT_LEVELS[spec.act]
        self._values = T.alloc_buffer((ACT_GROUP,), "float32")
        self._peak = T.alloc_buffer((1,), "float32")

    def emit(self, x: Buffer, row: Expr | int, half: Expr, group: Expr) -> QuantizedGroup:
        """Emit code for a group of half a row of x."""
        copy_group(self._values, x, self._m, row, half, group)
        vectors = [self._values[span(i * _LANES, _LANES)] for i in range(ACT_GROUP // _LANES)]
        store(self._peak, 0, reduce("fmax", "float32", [T.abs(v) for v in vectors]))
        peak, levels = self._peak[0], T.float32(self._levels)
        scale = peak * T.float32(1 / self._levels)
        inverse = T.if_then_else(peak > T.float32(0), levels / peak, T.float32(0))
        inverse = T.broadcast(T.bind(inverse), _LANES)
        # nearbyint rounds ties to even, as rint does.
        q = [T.bind(T.cast(T.nearbyint(v * inverse), f"int32x{_LANES}")) for v in vectors]
        return QuantizedGroup(q, scale)


def copy_group(values: Buffer, x: Buffer, m: int, row: Expr | int, half: Expr, group: Expr) -> None:
    """Copy a group of half a row of x, whose halves have ``m`` columns; zeros stand past them."""
    whole, rest = divmod(m, ACT_GROUP)
    first = T.bind(half * m + group * ACT_GROUP)

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


class BlockedActivations(ABC):
    """Quantised activations of rows of x that are multiplied in the blocks of `each_block`.

    Attributes:
        rows: of x; a number, 1, for batch ``single``.
    """

    rows: Expr | int

    def quantize(self, x: Buffer, tokens: int) -> None:
        """Quantise all rows of x: blocks of ``tokens``, and blocks of one for the rows left."""
        if isinstance(self.rows, int):
            self._quantize(x, 0, Tokens(0, 1), 0)
            return
        with T.parallel(0, self.rows) as row:
            whole = T.floordiv(self.rows, tokens) * tokens
            lane = T.bind(T.if_then_else(row < whole, T.floormod(row, tokens), 0))
            count = T.bind(T.if_then_else(row < whole, T.int64(tokens), T.int64(1)))
            self._quantize(x, row, Tokens(T.bind(row - lane), count), lane)

    @abstractmethod
    def _quantize(self, x: Buffer, row: Expr | int, tokens: Tokens, lane: Expr | int) -> None:
        """Quantise a row, the one of number ``lane`` in the block ``tokens``."""


class Activations(BlockedActivations):
    """Scratch buffers of quantised activations, and the code that fills them.

    - ``q`` int32, four bytes (one digit of the activations of a column block) in a word;
    - ``scale`` float32, the scale of a group of 128 columns;
    - ``sum`` int32, the sum of the q of a *flush*: the columns between two changes of scale, 64 or
      128, see `CodebookFunction`.

    The scratch of a block of tokens begins where that of the rows before it ends, and interleaves
    the block's tokens, so that what a step reads is contiguous: [item][token][re, im][digit].
    """

    def __init__(self, spec: PhaseSpec, rows: Expr | int, flush: int) -> None:
        self._spec, self.rows, self.flush = spec, rows, flush
        self.digits = DIGITS[spec.act]
        self.groups = -(-spec.m // ACT_GROUP)
        self._blocks = self.groups * ACT_GROUP // BLOCK
        self.flushes = self.groups * ACT_GROUP // flush
        self._q = T.alloc_buffer((2 * self.digits * rows * self._blocks,), "int32")
        self._scale = T.alloc_buffer((2 * rows * self.groups,), "float32")
        self._sum = T.alloc_buffer((2 * rows * self.flushes,), "int32")

    def word(self, tokens: Tokens, block: Expr, lane: int, half: int, digit: int = 0) -> Expr:
        """Return one digit of the activations of column block ``block``; half 0 is re, 1 im."""
        return self._q[_slot(tokens, self._blocks, block, lane, half) * self.digits + digit]

    def sum(self, tokens: Tokens, flush: Expr, lane: int, half: int) -> Expr:
        """Return the sum of the activations of a flush."""
        return self._sum[_slot(tokens, self.flushes, flush, lane, half)]

    def scale(self, tokens: Tokens, flush: Expr, lane: int, half: int) -> Expr:
        """Return the scale of the group that a flush is in."""
        group = T.floordiv(flush, ACT_GROUP // self.flush)
        return self._scale[_slot(tokens, self.groups, group, lane, half)]

    def _quantize(self, x: Buffer, row: Expr | int, tokens: Tokens, lane: Expr | int) -> None:
        group_blocks, group_flushes = ACT_GROUP // BLOCK, ACT_GROUP // self.flush
        quantizer = GroupQuantizer(self._spec)
        words = [T.alloc_buffer((group_blocks,), "int32") for _ in range(self.digits)]
        with T.serial(0, 2) as half, T.serial(0, self.groups) as group:
            quantized = quantizer.emit(x, row, half, group)
            store(self._scale, _slot(tokens, self.groups, group, lane, half), quantized.scale)
            per_vector = _LANES // BLOCK
            for digit, vectors in enumerate(quantized.digits(self._spec.act)):
                for i, vector in enumerate(vectors):
                    four = T.reinterpret(f"int32x{per_vector}", vector)
                    store(words[digit], span(i * per_vector, per_vector), four)
            with T.serial(0, group_blocks) as i:
                at = _slot(tokens, self._blocks, group * group_blocks + i, lane, half)
                for digit in range(self.digits):
                    store(self._q, at * self.digits + digit, words[digit][i])
            per_flush = len(quantized.q) // group_flushes
            for f in range(group_flushes):
                total = reduce("add", "int32", quantized.q[f * per_flush : (f + 1) * per_flush])
                at = _slot(tokens, self.flushes, group * group_flushes + f, lane, half)
                store(self._sum, at, total)


def dot(isa: Isa, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Return int32 sums plus the dot products of four unsigned and four signed bytes each.

    pmaddubsw saturates int16 sums of two products, so unsigned bytes are 127 at most where there is
    no dot product instruction.
    """
    rows = isa.rows
    if isa.dot:
        return T.call_llvm_pure_intrin(f"int32x{rows}", isa.dot, total, unsigned, signed)
    pairs = multiply_pairs(isa, unsigned, signed)
    return total + add_neighbours(isa, pairs)


def multiply_pairs(isa: Isa, unsigned: Expr, signed: Expr) -> Expr:
    """Return int16 sums of two products of an unsigned and a signed byte each."""
    kind = f"int16x{2 * isa.rows}"
    return T.call_llvm_pure_intrin(kind, "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def add_neighbours(isa: Isa, pairs: Expr) -> Expr:
    """Widen int16 to int32, adding neighbours."""
    ones = T.broadcast(T.int16(1), 2 * isa.rows)
    return T.call_llvm_pure_intrin(f"int32x{isa.rows}", "llvm.x86.avx2.pmadd.wd", pairs, ones)


def join_digits(digits: Sequence[Expr], lanes: int) -> Expr:
    """Return the int32 sum of digit d times 256^d: of activations, or of their dot products."""
    value = digits[-1]
    for lower in reversed(digits[:-1]):
        value = T.shift_left(value, T.broadcast(T.int32(8), lanes)) + lower
    return value


def span(first: Expr | int, lanes: int) -> Expr:
    """Return the index of ``lanes`` consecutive elements."""
    return T.ramp(first, 1, lanes)


def store(buffer: Buffer, index: Any, value: Expr) -> None:
    """Store to ``buffer[index]``; a tuple has one index for each dimension."""
    T.buffer_store(buffer, value, list(index) if isinstance(index, tuple) else [index])


def reduce(kind: str, dtype: str, vectors: Sequence[Expr]) -> Expr:
    """Return the ``fmax`` or sum (``add``) of all lanes of all vectors."""
    total, *rest = vectors
    for vector in rest:
        total = T.max(total, vector) if kind == "fmax" else total + vector
    return T.call_llvm_pure_intrin(dtype, f"llvm.vector.reduce.{kind}", T.bind(total))


def _slot(tokens: Tokens, per_token: int, item: Expr, lane: Expr | int, half: Expr | int) -> Expr:
    """Return the scratch index of an item of the token ``lane`` of a block."""
    return (tokens.first * per_token + item * tokens.count + lane) * 2 + half
