"""TIR of the x86 phase GEMM for many tokens: AMX tiles of decoded weights and activations.

What tiles are and how they are multiplied, `x86_amx_tiles` says.

    for each row tile (in parallel):
        for each block of columns, for each set of panels (see `x86_panels`):
            decode the panels to L1
            for each 16 tokens, for each flush of the columns:
                sums[half of x, re or im of y] = half of x times panel
                out[token][re, im] += weight scale * activation scale * sums
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels import x86_amx_tiles
from fairy_compile.kernels.opaque import opaque
from fairy_compile.kernels.x86_activations import join_digits, span, store
from fairy_compile.kernels.x86_amx_activations import BYTES, HALVES, ROWS, TileActivations
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.kernels.x86_outputs import RowTileOutputs
from fairy_compile.kernels.x86_panel_layout import MIN_TOKENS, Panel
from fairy_compile.kernels.x86_panels import PANELS, PanelMultiply
from fairy_compile.op import ACT_GROUP

if TYPE_CHECKING:
    from tvm.ir import Expr


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
            self.sums = T.alloc_buffer((PANELS, self.digits, ROWS, ROWS), "int32")
            panels.decode_all(tile, lambda *panel: self._multiply_all_tokens(tile, *panel))
            x86_amx_tiles.release()
            with T.serial(0, self.rows) as token:
                at = T.bind(token * 2 * ROWS)
                outputs.store(token, (self.out, self.out), (at, at + ROWS))

    # Products

    def _multiply_all_tokens(self, tile: Expr, panel: Panel, first: Expr, count: Expr) -> None:
        tokens = self.activations.tokens
        with T.serial(0, T.floordiv(tokens, ROWS)) as block:
            token = T.bind(block * ROWS)
            with T.serial(0, count) as i:
                for digit in range(self.digits):
                    self._sum(first, i, digit, token)
                # What comes next: more columns, more tokens, or the next block of columns.
                here, last = i + 1 < count, token + ROWS == tokens
                next_flush = T.Select(here, first + i + 1, T.Select(last, first + count, first))
                next_token = T.Select(here, token, T.Select(last, T.int64(0), token + ROWS))
                then = opaque(next_flush, "int64"), opaque(next_token, "int64")
                self._scale_sums(tile, panel, T.bind(first + i), token, then)

    def _sum(self, first: Expr, i: Expr, digit: int, token: Expr) -> None:
        """Sum a flush of 16 tokens."""
        tiles = self.flush_tiles

        def activations(k: int, half: int) -> Expr:
            return self.activations.address((first + i) * tiles + k, half, digit, token)

        def weights(k: int, number: int) -> Expr:
            return T.address_of(self.panels.buffer[number, self.panels.at(i, k * (BYTES // BLOCK))])

        targets = [T.address_of(self.sums[number, digit, 0, 0]) for number in range(PANELS)]
        products = [(number // 2, number) for number in range(PANELS)]
        x86_amx_tiles.sum_products(tiles, products, activations, weights, targets)

    def _scale_sums(
        self, tile: Expr, panel: Panel, flush: Expr, token: Expr, then: tuple[Expr, Expr]
    ) -> None:
        """Add a flush's sums, scaled, to the outputs of 16 tokens; ``then`` is next."""
        products = self._scale_products(tile, panel, flush, token)
        with T.serial(0, ROWS) as t:
            next_flush, next_token = then
            self.activations.prefetch(
                next_flush * self.flush_tiles, self.flush_tiles, next_token, t
            )
            for axis in (0, 1):
                at = span(T.bind(((token + t) * 2 + axis) * ROWS), ROWS)
                total = self.out[at]
                for half in range(HALVES):
                    own = [
                        self.sums[2 * half + axis, d, t, span(0, ROWS)] for d in range(self.digits)
                    ]
                    value = T.cast(join_digits(own, ROWS), f"float32x{ROWS}")
                    total = total + value * products(half, axis, t)
                store(self.out, at, total)

    def _scale_products(
        self, tile: Expr, panel: Panel, flush: Expr, token: Expr
    ) -> Callable[[int, int, Expr], Expr]:
        """Return (half of x, axis of y, token of the block) -> scale of the sums, for each row.

        Scales that all rows share are multiplied for 16 tokens at a time.
        """
        weight = self.panels.scales(tile, panel, flush)
        group = opaque(T.floordiv(flush, ACT_GROUP // self.panels.flush), "int64")
        if self.spec.scale == "row":
            return lambda half, axis, t: (
                weight[half ^ axis]
                * T.broadcast(self.activations.scale(group, half, token + t), ROWS)
            )
        products = T.alloc_buffer((HALVES, 2, ROWS), "float32")
        for half in range(HALVES):
            activation = T.bind(self.activations.tile_scales(group, half, token))
            for axis in (0, 1):
                store(products, (half, axis, span(0, ROWS)), activation * weight[half ^ axis])
        return lambda half, axis, t: T.broadcast(products[half, axis, t], ROWS)
