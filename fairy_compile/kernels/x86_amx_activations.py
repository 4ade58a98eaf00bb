"""TIR of quantised activations as AMX tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import DIGITS, GroupQuantizer, span, store
from fairy_compile.op import ACT_GROUP, PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

ROWS = 16
"""Rows of a tile."""
BYTES = 64
"""Bytes of a tile's row."""
HALVES = 2
"""Re x and Im x."""
_PREFETCH_L1 = 3  # LLVM's temporal locality


class TileActivations:
    """Scratch buffers of the activations of all tokens, padded to whole tiles.

    - int8 tiles (16 tokens, 64 columns) in the order [tile of tokens][tile of columns][half of x]
      [digit], so that a block of tokens reads on and on;
    - float32 scales [group][half of x][token].

    Attributes:
        tokens: rows of x, rounded up to whole tiles; those added are zeros.
        digits: bytes of an activation.
        groups: groups of 128 columns.
    """

    def __init__(self, spec: PhaseSpec, rows: Expr) -> None:
        self._spec, self._rows = spec, rows
        self.tokens = T.bind(T.floordiv(rows + (ROWS - 1), ROWS) * ROWS)
        self.digits = DIGITS[spec.act]
        self.groups = -(-spec.m // ACT_GROUP)
        size = HALVES * self.digits * self.groups * ACT_GROUP * self.tokens
        self._q = T.alloc_buffer((size,), "int8")
        self._scale = T.alloc_buffer((self.groups * HALVES * self.tokens,), "float32")

    def address(self, column_tile: Expr, half: int, digit: int, token: Expr) -> Expr:
        """Return the address of the tile whose first row is ``token``."""
        return T.address_of(self._q[self._at(column_tile, half, digit, token)])

    def scale(self, group: Expr, half: int, token: Expr) -> Expr:
        """Return a token's scale."""
        return self._scale[self._scale_at(group, half, token)]

    def tile_scales(self, group: Expr, half: int, token: Expr) -> Expr:
        """Return the scales of the 16 tokens of a tile, as a vector."""
        return self._scale[span(self._scale_at(group, half, token), ROWS)]

    def prefetch(self, column_tile: Expr, column_tiles: int, token: Expr, part: Expr) -> None:
        """Prefetch a 16th, ``part``, of some tiles of columns of the tile of tokens at ``token``.

        All parts fetch the tiles from L2; past the end it does nothing.
        """
        lines = column_tiles * HALVES * self.digits
        first = T.bind(self._at(column_tile, 0, 0, token) + part * (lines * BYTES))
        for line in range(lines):
            address = T.address_of(self._q[first + line * BYTES])
            T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, _PREFETCH_L1, 1))

    def quantize(self, x: Buffer) -> None:
        """Quantise all rows of x."""
        with T.parallel(0, self.tokens) as row:
            quantizer = GroupQuantizer(self._spec)
            with (
                T.serial(0, HALVES) as half,
                T.serial(0, self.groups) as group,
                T.If(row < self._rows),
            ):
                with T.Then():
                    quantized = quantizer.emit(x, row, half, group)
                    store(self._scale, self._scale_at(group, half, row), quantized.scale)
                    for digit, vectors in enumerate(quantized.digits(self._spec.act)):
                        self._store_digit(row, half, group, digit, vectors)
                with T.Else():
                    store(self._scale, self._scale_at(group, half, row), T.float32(0))
                    zeros = [T.broadcast(T.int8(0), BYTES)] * (ACT_GROUP // BYTES)
                    for digit in range(self.digits):
                        self._store_digit(row, half, group, digit, zeros)

    def _store_digit(
        self, row: Expr, half: Expr, group: Expr, digit: int, vectors: list[Expr]
    ) -> None:
        """Store the vectors of a group's columns, in order."""
        lanes = ACT_GROUP // len(vectors)
        for i, vector in enumerate(vectors):
            tile, byte = divmod(i * lanes, BYTES)
            at = self._at(group * (ACT_GROUP // BYTES) + tile, half, digit, row)
            store(self._q, span(at + byte, lanes), vector)

    def _at(self, column_tile: Expr, half: Expr | int, digit: int, token: Expr) -> Expr:
        column_tiles = self.groups * (ACT_GROUP // BYTES)
        tile = T.floordiv(token, ROWS) * column_tiles + column_tile
        tile = (tile * HALVES + half) * self.digits + digit
        return (tile * ROWS + T.floormod(token, ROWS)) * BYTES

    def _scale_at(self, group: Expr, half: Expr | int, token: Expr) -> Expr:
        return (group * HALVES + half) * self.tokens + token
