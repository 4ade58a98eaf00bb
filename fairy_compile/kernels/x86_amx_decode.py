"""TIR of the x86 phase GEMM for many sequences that decode: AMX tiles, results as of one row.

`x86_amx` combines scales as it likes; here every row's result has to be that of batch ``single``,
bit for bit. Integer sums are exact in any order, so it is enough to sum the entries of the same
tables, without the offset that makes them unsigned, over the same flushes, and to scale and add the
sums in the same order (see `x86_codegen`).

    for each row tile (in parallel):
        for each flush of the columns:
            look the entries of all units up, to L1
            for each 16 rows of x, for each group of units:
                sums[unit, product] = half of x that the product meets, times entries
                out[row of x][re, im] += table scale * activation scale * sums, unit by unit
"""

from __future__ import annotations

from collections.abc import Callable
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

_GROUP = 4  # sums at a time, what there are registers for


@dataclass(frozen=True)
class _Sum:
    """A sum of a group: its place there, its unit and the product."""

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
        self._groups = [
            [_Sum(number, *product) for number, product in enumerate(products[i : i + _GROUP])]
            for i in range(0, len(products), _GROUP)
        ]

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
            self._found = T.alloc_buffer((_GROUP, self._digits, ROWS, ROWS), "int32")
            with T.serial(0, flushes) as flush:
                self._look_up(tile, flush, tables)
                with T.serial(0, T.floordiv(rows, ROWS)) as block:
                    self._multiply(tile, flush, T.bind(block * ROWS))
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

    def _multiply(self, tile: Expr, flush: Expr, row: Expr) -> None:
        """Add a flush to the outputs of 16 rows of x, from ``row`` on."""
        scale_of = self._row_scales(tile, flush, row)
        for number, group in enumerate(self._groups):
            for digit in range(self._digits):
                self._sum(flush, group, digit, row)
            self._scale(flush, group, scale_of, row, prefetch=number == 0)

    def _sum(self, flush: Expr, group: list[_Sum], digit: int, row: Expr) -> None:
        """Sum a flush of 16 rows of x."""
        tiles = self._function.flush // BYTES

        def activations(k: int, half: int) -> Expr:
            return self._activations.address(flush * tiles + k, half, digit, row)

        def weights(k: int, unit: int) -> Expr:
            return T.address_of(self._entries[unit, k * (BYTES // BLOCK) * BYTES])

        targets = [T.address_of(self._found[one.number, digit, 0, 0]) for one in group]
        products = [(one.product.half, one.unit) for one in group]
        x86_amx_tiles.sum_products(tiles, products, activations, weights, targets)

    def _row_scales(self, tile: Expr, flush: Expr, row: Expr) -> Callable[[_Sum, Expr], Expr]:
        """Return (sum, row of the block) -> its scale, for each row of weights.

        Scales that all rows of weights share are multiplied for 16 rows of x at a time.
        """
        function, activations = self._function, self._activations
        group = T.bind(T.floordiv(flush, ACT_GROUP // function.flush))
        units = range(len(function.book.units))
        weights = [T.bind(function.scale(tile, flush, unit)) for unit in units]
        if function.spec.scale == "row":
            return lambda one, t: (
                weights[one.unit]
                * T.broadcast(activations.scale(group, one.product.half, row + t), ROWS)
            )
        products = T.alloc_buffer((len(weights), HALVES, ROWS), "float32")
        for half in range(HALVES):
            scales = T.bind(activations.tile_scales(group, half, row))
            for unit, weight in enumerate(weights):
                store(products, (unit, half, span(0, ROWS)), weight * scales)
        return lambda one, t: T.broadcast(products[one.unit, one.product.half, t], ROWS)

    def _scale(
        self,
        flush: Expr,
        group: list[_Sum],
        scale_of: Callable[[_Sum, Expr], Expr],
        row: Expr,
        prefetch: bool,
    ) -> None:
        """Add the sums of a group, scaled, to the outputs, in the order of batch ``single``."""
        flush_tiles = self._function.flush // BYTES
        last = row + ROWS == self._activations.tokens
        next_flush = T.bind(T.Select(last, flush + 1, flush))
        next_row = T.bind(T.Select(last, T.int64(0), row + ROWS))
        with T.serial(0, ROWS) as t:
            if prefetch:  # what the next rows of x meet, while these are scaled
                self._activations.prefetch(next_flush * flush_tiles, flush_tiles, next_row, t)
            at = [span(T.bind(((row + t) * 2 + axis) * ROWS), ROWS) for axis in (0, 1)]
            totals = [self._out[where] for where in at]
            for one in group:
                sums = [self._found[one.number, d, t, span(0, ROWS)] for d in range(self._digits)]
                value = T.cast(join_digits(sums, ROWS), f"float32x{ROWS}") * scale_of(one, t)
                total, output = totals[one.product.output], one.product.output
                totals[output] = T.bind(total - value if one.product.negative else total + value)
            for where, total in zip(at, totals, strict=True):
                store(self._out, where, total)
