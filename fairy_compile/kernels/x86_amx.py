"""TIR of the x86 phase GEMM for many tokens: AMX tiles of decoded weights and activations.

A *tile* is 16 rows of 64 bytes. TDPBSSD adds to C, int32 (16 tokens, 16 weight rows), the product
of A, int8 (16 tokens, 64 columns), and B, the 64 columns of 16 weight rows:

    B[k][4 * row + j] = weight[row][4 * k + j]

which is the order that 16 vectors of `X86Layout` codes have, so decoding is one pass over bytes.

    for each row tile (in parallel):
        for each block of columns, for each set of panels (see `x86_panels`):
            decode the panels to L1
            for each block of up to 32 tokens, for each flush of the columns:
                C[half of x][re, im] = sums of both tiles of tokens
                out[token][re, im] += weight scale * activation scale * C
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels import x86_amx_tiles
from fairy_compile.kernels.x86_activations import join_digits, span, store
from fairy_compile.kernels.x86_amx_activations import BYTES, HALVES, ROWS, TileActivations
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.kernels.x86_outputs import RowTileOutputs
from fairy_compile.kernels.x86_panel_layout import MIN_TOKENS, Panel
from fairy_compile.kernels.x86_panels import PanelMultiply
from fairy_compile.op import ACT_GROUP

if TYPE_CHECKING:
    from tvm.ir import Expr


# Tiles of tokens that share a weight tile. Two make 4 C, 2 A and 2 B tiles, all there are.
_BLOCK_TILES = 2


class TileMultiply(PanelMultiply):
    """Multiplies in AMX tiles."""

    @property
    def flush_tiles(self) -> int:
        """Tiles of columns of a flush."""
        return self.panels.flush // BYTES

    def usable(self) -> Expr:
        """Return whether there are enough tokens, and tiles."""
        return T.And(self.rows >= MIN_TOKENS, x86_amx_tiles.permitted())

    def emit(self) -> None:
        """Emit quantisation and multiplication."""
        tiles, panels = int(self.arrays["codes"].shape[0]), self.panels
        self.activations = TileActivations(self.spec, self.rows)
        self.activations.quantize(self.x)
        tokens = self.activations.tokens
        with T.parallel(0, tiles) as tile:
            outputs = RowTileOutputs(self.spec, ROWS, self.y, tile)
            x86_amx_tiles.configure()
            self.out = T.alloc_buffer((tokens * 2 * ROWS,), "float32")
            with T.serial(0, tokens * 2) as i:
                store(self.out, span(i * ROWS, ROWS), T.broadcast(T.float32(0), ROWS))
            panels.allocate()
            self.sums = T.alloc_buffer(
                (HALVES * self.digits, 2, _BLOCK_TILES * ROWS, ROWS), "int32"
            )
            panels.decode_all(tile, lambda *panel: self._multiply_all_tokens(tile, *panel))
            x86_amx_tiles.release()
            with T.serial(0, self.rows) as token:
                at = T.bind(token * 2 * ROWS)
                outputs.store(token, (self.out, self.out), (at, at + ROWS))

    # Products

    def _multiply_all_tokens(self, tile: Expr, panel: Panel, first: Expr, count: Expr) -> None:
        size = _BLOCK_TILES * ROWS
        tokens = self.activations.tokens
        blocks = T.bind(T.floordiv(tokens, size))
        with T.serial(0, blocks) as block:
            token = T.bind(block * size)
            self._multiply_tokens(tile, panel, first, count, token, _BLOCK_TILES)
        with T.If(blocks * size < tokens), T.Then():
            self._multiply_tokens(tile, panel, first, count, T.bind(blocks * size), 1)

    def _multiply_tokens(
        self, tile: Expr, panel: Panel, first: Expr, count: Expr, token: Expr, tiles: int
    ) -> None:
        with T.serial(0, count) as i:
            for half in range(HALVES):
                for digit in range(self.digits):
                    self._sum(first, i, half, digit, token, tiles)
            self._scale_sums(tile, panel, T.bind(first + i), token, tiles)

    def _sum(self, first: Expr, i: Expr, half: int, digit: int, token: Expr, tiles: int) -> None:
        """Sum a flush: tile registers 0-3 are C[re, im][tile of tokens], 4-5 A and 6-7 B."""
        for c in range(2 * tiles):
            x86_amx_tiles.zero(c)
        for k in range(self.flush_tiles):
            for t in range(tiles):
                column_tile = (first + i) * self.flush_tiles + k
                at = self.activations.address(column_tile, half, digit, token + t * ROWS)
                x86_amx_tiles.load(4 + t, at)
            at = self.panels.at(i, k * (BYTES // BLOCK))
            for axis in (0, 1):
                weights = T.address_of(self.panels.buffer[2 * half + axis, at])
                x86_amx_tiles.load(6 + axis, weights)
                for t in range(tiles):
                    x86_amx_tiles.multiply(axis * tiles + t, 4 + t, 6 + axis)
        for axis in (0, 1):
            for t in range(tiles):
                target = self.sums[half * self.digits + digit, axis, t * ROWS, 0]
                x86_amx_tiles.save(axis * tiles + t, T.address_of(target))

    def _scale_sums(self, tile: Expr, panel: Panel, flush: Expr, token: Expr, tiles: int) -> None:
        """Add a flush's sums, scaled, to the outputs of a block of tokens."""
        lanes = ROWS
        products = self._scale_products(tile, panel, flush, token, tiles)
        with T.serial(0, tiles * ROWS) as t:
            # The next flush's, while this one is scaled.
            self.activations.prefetch((flush + 1) * self.flush_tiles, self.flush_tiles, token + t)
            for axis in (0, 1):
                at = span(T.bind(((token + t) * 2 + axis) * lanes), lanes)
                total = self.out[at]
                for half in range(HALVES):
                    digits = [
                        self.sums[half * self.digits + d, axis, t, span(0, lanes)]
                        for d in range(self.digits)
                    ]
                    value = T.cast(join_digits(digits, lanes), f"float32x{lanes}")
                    total = total + value * products(half, axis, t)
                store(self.out, at, total)

    def _scale_products(
        self, tile: Expr, panel: Panel, flush: Expr, token: Expr, tiles: int
    ) -> Callable[[int, int, Expr], Expr]:
        """Return (half of x, axis of y, token of the block) -> scale of the sums, for each row.

        Scales that all rows share are multiplied for 16 tokens at a time.
        """
        lanes = ROWS
        weight = self.panels.scales(tile, panel, flush)
        group = T.bind(T.floordiv(flush, ACT_GROUP // self.panels.flush))
        if self.spec.scale == "row":
            return lambda half, axis, t: (
                weight[half ^ axis]
                * T.broadcast(self.activations.scale(group, half, token + t), lanes)
            )
        products = T.alloc_buffer((HALVES, 2, _BLOCK_TILES * ROWS), "float32")
        for half in range(HALVES):
            for t in range(0, tiles * ROWS, lanes):
                activation = T.bind(self.activations.tile_scales(group, half, token + t))
                for axis in (0, 1):
                    store(products, (half, axis, span(t, lanes)), activation * weight[half ^ axis])
        return lambda half, axis, t: T.broadcast(products[half, axis, t], lanes)
