"""TIR of the x86 phase GEMM for many sequences that decode: AMX tiles, results as of one row.

`x86_amx` combines scales as it likes; here every row's result has to be that of batch ``single``,
bit for bit. Integer sums are exact in any order, so it is enough to sum the entries of the same
tables, without the offset that makes them unsigned, over the same flushes, and to scale and add the
sums in the same order (see `x86_codegen`).

    for each row tile (in parallel):
        for each flush of the columns:
            look the entries of all units up, to L1
            for each block of up to 32 rows of x:
                sums[unit, product] = half of x that the product meets, times entries
                out[row of x][re, im] += table scale * activation scale * sums, unit by unit
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels import x86_amx_tiles
from fairy_compile.kernels.x86_activations import DIGITS, join_digits, span, store
from fairy_compile.kernels.x86_amx_activations import BYTES, HALVES, ROWS, TileActivations
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.kernels.x86_outputs import RowTileOutputs
from fairy_compile.kernels.x86_panel_layout import MIN_TOKENS
from fairy_compile.kernels.x86_tables import Product
from fairy_compile.op import ACT_GROUP

if TYPE_CHECKING:
    from tvm.ir import Expr

    from fairy_compile.kernels.x86_codegen import CodebookFunction

# As in `x86_amx`: tiles of rows of x, and units, whose sums are in registers at a time.
_BLOCK_TILES = 2
_UNITS = 2


@dataclass(frozen=True)
class _Sum:
    """A sum that is kept: its place among all, its unit and the product."""

    number: int
    unit: int
    product: Product


class TableTiles:
    """Emits the multiplication of all rows of x, with the tables of ``function``.

    Attributes:
        mode: the tables.
    """

    def __init__(self, function: CodebookFunction) -> None:
        self._function, self.mode = function, function.tables
        self._digits = DIGITS[function.spec.act]
        self._flush_blocks = function.flush // BLOCK
        units = enumerate(function.book.units)
        products = [(u, product) for u, unit in units for product in unit.products]
        self._sums = [_Sum(i, u, product) for i, (u, product) in enumerate(products)]

    def usable(self) -> Expr:
        """Return whether there are enough rows, and tiles, as a condition."""
        return T.And(self._function.rows >= MIN_TOKENS, x86_amx_tiles.permitted())

    def emit(self) -> None:
        """Emit quantisation and multiplication."""
        function = self._function
        units = len(function.book.units)
        self._activations = TileActivations(function.spec, function.rows)
        self._activations.quantize(function.x)
        rows = self._activations.tokens
        flushes = self._activations.groups * ACT_GROUP // function.flush
        with T.parallel(0, function.layout.tiles(function.spec)) as tile:
            outputs = RowTileOutputs(function.spec, ROWS, function.y, tile)
            tables = {
                look: function.load_table(tile, look, signed=True) for look in function.book.lookups
            }
            x86_amx_tiles.configure()
            self._out = T.alloc_buffer((rows * 2 * ROWS,), "float32")
            with T.serial(0, rows * 2) as i:
                store(self._out, span(i * ROWS, ROWS), T.broadcast(T.float32(0), ROWS))
            self._entries = T.alloc_buffer((units, self._flush_blocks * BYTES), "int8")
            block_rows = _BLOCK_TILES * ROWS
            self._found = T.alloc_buffer((len(self._sums), self._digits, block_rows, ROWS), "int32")
            if function.spec.scale != "row":
                self._scales = T.alloc_buffer((units, HALVES, block_rows), "float32")
            with T.serial(0, flushes) as flush:
                self._look_up(tile, flush, tables)
                blocks = T.bind(T.floordiv(rows, block_rows))
                with T.serial(0, blocks) as block:
                    self._multiply(tile, flush, T.bind(block * block_rows), _BLOCK_TILES)
                with T.If(blocks * block_rows < rows), T.Then():
                    self._multiply(tile, flush, T.bind(blocks * block_rows), 1)
            x86_amx_tiles.release()
            with T.serial(0, function.rows) as row:
                at = T.bind(row * 2 * ROWS)
                outputs.store(row, (self._out, self._out), (at, at + ROWS))

    def _look_up(self, tile: Expr, flush: Expr, tables: dict) -> None:
        """Fill the entries of a flush: vectors of a column block, which are rows of B tiles."""
        function, book = self._function, self._function.book
        flush_steps = self._flush_blocks // function.step_blocks
        with T.serial(0, flush_steps) as i:
            step = T.bind(flush * flush_steps + i)
            function.prefetch_codes(tile, step)
            nibbles = sorted({look.nibble for look in book.lookups})
            indices = {n: function.index(tile, step, n) for n in nibbles}
            for entry in book.entries:
                (look,) = entry.lookups  # two are combined where there is no dot product
                value = function.look_up(book.lookups[look], tables, indices)
                at = (i * function.step_blocks + entry.block) * BYTES
                store(self._entries, (entry.unit, span(at, BYTES)), value)

    def _multiply(self, tile: Expr, flush: Expr, row: Expr, tiles: int) -> None:
        """Add a flush to the outputs of one or two tiles of rows of x, from ``row`` on."""
        for half in range(HALVES):
            for together in self._together(half):
                for digit in range(self._digits):
                    self._sum(flush, together, half, digit, row, tiles)
        self._scale(tile, flush, row, tiles)

    def _together(self, half: int) -> Iterator[list[_Sum]]:
        """Yield the sums of a half of x that are in registers at a time."""
        own = [s for s in self._sums if s.product.half == half]
        for first in range(0, len(own), _UNITS):
            yield own[first : first + _UNITS]

    def _sum(
        self, flush: Expr, sums: list[_Sum], half: int, digit: int, row: Expr, tiles: int
    ) -> None:
        """Sum a flush: registers 0-3 are C[sum][tile of rows], 4-5 A and 6-7 B."""
        for c in range(len(sums) * tiles):
            x86_amx_tiles.zero(c)
        flush_tiles = self._function.flush // BYTES
        for k in range(flush_tiles):
            for t in range(tiles):
                at = self._activations.address(flush * flush_tiles + k, half, digit, row + t * ROWS)
                x86_amx_tiles.load(4 + t, at)
            for i, one in enumerate(sums):
                entries = self._entries[one.unit, k * (BYTES // BLOCK) * BYTES]
                x86_amx_tiles.load(6 + i, T.address_of(entries))
                for t in range(tiles):
                    x86_amx_tiles.multiply(i * tiles + t, 4 + t, 6 + i)
        for i, one in enumerate(sums):
            for t in range(tiles):
                target = self._found[one.number, digit, t * ROWS, 0]
                x86_amx_tiles.save(i * tiles + t, T.address_of(target))

    def _scale(self, tile: Expr, flush: Expr, row: Expr, tiles: int) -> None:
        """Add the sums, scaled, to the outputs, in the order of batch ``single``."""
        function, activations = self._function, self._activations
        group = T.bind(T.floordiv(flush, ACT_GROUP // function.flush))
        by_row = function.spec.scale == "row"
        weights = [T.bind(function.scale(tile, flush, u)) for u in range(len(function.book.units))]
        if not by_row:
            for half in range(HALVES):
                for t in range(0, tiles * ROWS, ROWS):
                    scales = T.bind(activations.tile_scales(group, half, row + t))
                    for u, weight in enumerate(weights):
                        store(self._scales, (u, half, span(t, ROWS)), weight * scales)
        with T.serial(0, tiles * ROWS) as t:
            at = [span(T.bind(((row + t) * 2 + axis) * ROWS), ROWS) for axis in (0, 1)]
            totals = [self._out[where] for where in at]
            for one in self._sums:
                digits = [self._found[one.number, d, t, span(0, ROWS)] for d in range(self._digits)]
                value = T.cast(join_digits(digits, ROWS), f"float32x{ROWS}")
                half, output = one.product.half, one.product.output
                if by_row:
                    activation = T.broadcast(activations.scale(group, half, row + t), ROWS)
                    scale = weights[one.unit] * activation
                else:
                    scale = T.broadcast(self._scales[one.unit, half, t], ROWS)
                value = value * scale
                total = totals[output]
                totals[output] = T.bind(total - value if one.product.negative else total + value)
            for where, total in zip(at, totals, strict=True):
                store(self._out, where, total)
