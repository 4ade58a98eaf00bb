"""TIR of the x86 phase GEMM for many tokens: AMX tiles of decoded weights and activations.

A *tile* is 16 rows of 64 bytes. TDPBSSD adds to C, int32 (16 tokens, 16 weight rows), the product
of A, int8 (16 tokens, 64 columns), and B, the 64 columns of 16 weight rows:

    B[k][4 * row + j] = weight[row][4 * k + j]

which is the order that 16 vectors of `X86Layout` codes have, so decoding is one pass over bytes.

    for each row tile (in parallel):
        for each block of columns, for each panel (see `x86_amx_layout`):
            decode the four panels of the 2 x 2 real blocks to L1
            for each block of up to 32 tokens, for each flush of the columns:
                C[half of x][re, im] = sums of both tiles of tokens
                out[token][re, im] += weight scale * activation scale * C
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import DIGITS, join_digits, span, store
from fairy_compile.kernels.x86_amx_activations import BYTES, HALVES, ROWS, TileActivations
from fairy_compile.kernels.x86_amx_layout import Panel, TableMode, panels
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.kernels.x86_outputs import RowTileOutputs
from fairy_compile.kernels.x86_tables import blocks_per_step, joint_offset, nibbles
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase.tensor import TILE as SCALE_TILE

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

MIN_TOKENS = 9
"""Fewest rows of x that are worth a tile of 16; below, the decode kernel reads less."""

_TILES = 8
# Tiles of tokens that share a weight tile. Two make 4 C, 2 A and 2 B tiles, all there are.
_BLOCK_TILES = 2

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux gives tiles to processes that ask.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


class PanelMultiply:
    """Emits the multiplication of all rows of x by one call's weights.

    Args:
        spec: the call.
        x: float32 (b, 2m).
        arrays: those of `PanelLayout`.
        y: float32 (b, 2n).
        mode: what a panel holds.
        columns: columns to decode at a time, a multiple of 128.
        joint_limit: of the layout.
    """

    def __init__(
        self,
        spec: PhaseSpec,
        x: Buffer,
        arrays: dict[str, Buffer],
        y: Buffer,
        *,
        mode: TableMode,
        columns: int,
        joint_limit: int,
    ) -> None:
        self.spec, self.x, self.arrays, self.y, self.mode = spec, x, arrays, y, mode
        self.joint_limit = joint_limit
        self.rows = x.shape[0]
        self.digits = DIGITS[spec.act]
        self.flush = SCALE_TILE if spec.scale == "tile64" else ACT_GROUP
        self.flushes = -(-spec.m // ACT_GROUP) * ACT_GROUP // self.flush
        self.panel_flushes = columns // self.flush
        self.flush_tiles = self.flush // BYTES
        self.step_blocks = blocks_per_step(len(spec.terms), spec.stages)
        self.places = {
            (code.term, code.stage, code.block): (i // 2, 4 * (i % 2) + 2 * slot)
            for i, pair in enumerate(nibbles(len(spec.terms), spec.stages))
            for slot, code in enumerate(pair)
        }

    def usable(self) -> Expr:
        """Return whether there are enough tokens, and the system lets this process use tiles.

        Asking again costs a tenth of a microsecond and needs no state; where the system refuses
        (or the host is an older one), the caller's other path is taken.
        """
        request = (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
        refused = T.call_extern("int64", "syscall", *(T.int64(v) for v in request))
        return T.And(self.rows >= MIN_TOKENS, T.bind(refused) == 0)

    def emit(self) -> None:
        """Emit quantisation and multiplication."""
        tiles = int(self.arrays["codes"].shape[0])
        self.activations = TileActivations(self.spec, self.rows)
        self.activations.quantize(self.x)
        tokens = self.activations.tokens
        with T.parallel(0, tiles) as tile:
            outputs = RowTileOutputs(self.spec, ROWS, self.y, tile)
            self._configure()
            self.out = T.alloc_buffer((tokens * 2 * ROWS,), "float32")
            with T.serial(0, tokens * 2) as i:
                store(self.out, span(i * ROWS, ROWS), T.broadcast(T.float32(0), ROWS))
            self.panel = T.alloc_buffer((4, self.panel_flushes * self.flush * ROWS), "int8")
            self.sums = T.alloc_buffer(
                (HALVES * self.digits, 2, _BLOCK_TILES * ROWS, ROWS), "int32"
            )
            with T.serial(0, -(-self.flushes // self.panel_flushes)) as i:
                first = T.bind(i * self.panel_flushes)
                count = T.bind(T.min(self.panel_flushes, self.flushes - first))
                for panel in panels(len(self.spec.terms), self.spec.stages, self.mode):
                    self._decode(tile, panel, first, count)
                    self._multiply_all_tokens(tile, panel, first, count)
            T.evaluate(_tile_op("tilerelease"))
            with T.serial(0, self.rows) as token:
                at = T.bind(token * 2 * ROWS)
                outputs.store(token, (self.out, self.out), (at, at + ROWS))

    # Weights

    def _decode(self, tile: Expr, panel: Panel, first: Expr, count: Expr) -> None:
        """Fill the four panels with the flushes [first, first + count) of a row tile.

        In order: Re y from Re x, Im y from Re x, Re y from Im x, Im y from Im x.
        """
        units = [(term, stage, axis) for term, stage in panel.codes for axis in (0, 1)]
        tables = {u: T.alloc_buffer((BYTES,), "int8") for u in units}
        flush_steps = self.flush // (BLOCK * self.step_blocks)
        with T.serial(0, count) as i:
            for unit in units:
                store(tables[unit], span(0, BYTES), self._table(tile, panel, first + i, *unit))
            loaded = {u: T.bind(tables[u][span(0, BYTES)]) for u in units}
            with T.serial(0, flush_steps) as s:
                step = T.bind((first + i) * flush_steps + s)
                for block in range(self.step_blocks):
                    at = T.bind(((i * flush_steps + s) * self.step_blocks + block) * BYTES)
                    weights = self._look_up(tile, step, block, panel, loaded)
                    for number, weight in enumerate(weights):
                        store(self.panel, (number, span(at, BYTES)), weight)

    def _look_up(
        self, tile: Expr, step: Expr, block: int, panel: Panel, tables: dict[Any, Expr]
    ) -> list[Expr]:
        """Return the four panels' vectors of a column block.

        vpermb's index is six bits, (row, code): so scales may differ between rows.
        """
        byte_of_row = [4 * (i // BLOCK) for i in range(BYTES)]
        row = T.Shuffle([T.int8(v) for v in byte_of_row], list(range(BYTES)))
        sums: dict[tuple[str, int], Expr] = {}
        for term, stage in panel.codes:
            plane, shift = self.places[term, stage, block]
            codes = self.arrays["codes"][tile, step, plane, span(0, BYTES)]
            words = T.reinterpret(f"int32x{ROWS}", codes)
            if shift:  # bits that come from the next byte are cut off below
                words = T.shift_right(words, T.broadcast(T.int32(shift), ROWS))
            code = T.bitwise_and(
                T.reinterpret(f"int8x{BYTES}", words), T.broadcast(T.int8(3), BYTES)
            )
            index = T.bind(T.bitwise_or(code, row))
            for axis in (0, 1):
                args = (tables[term, stage, axis], index)
                entry = T.call_llvm_pure_intrin(
                    f"int8x{BYTES}", "llvm.x86.avx512.permvar.qi.512", *args
                )
                key = (self.spec.terms[term], axis)
                sums[key] = sums[key] + entry if key in sums else entry
        re_u, im_u, re_w, im_w = (sums.get((term, axis)) for term in "UW" for axis in (0, 1))
        return [_add(re_u, re_w), _add(im_u, im_w), _subtract(im_w, im_u), _subtract(re_u, re_w)]

    def _table(
        self, tile: Expr, panel: Panel, flush: Expr, term: int, stage: int, axis: int
    ) -> Expr:
        """Return one axis of a code as int8, for each row the entries of codes 0 .. 3.

        With weight p they are p, 0, -p, 0 on the real axis and 0, p, 0, -p on the imaginary one.
        """
        weight = self._weight(tile, flush, term, stage, axis)
        low, shift = T.broadcast(T.int32(255), ROWS), T.broadcast(T.int32(16), ROWS)
        positive = T.bitwise_and(weight, low)
        negative = T.bitwise_and(T.broadcast(T.int32(0), ROWS) - weight, low)
        word = T.bitwise_or(positive, T.shift_left(negative, shift))
        if axis:
            word = T.shift_left(word, T.broadcast(T.int32(8), ROWS))
        return T.reinterpret(f"int8x{BYTES}", word)

    def _weight(self, tile: Expr, flush: Expr, term: int, stage: int, axis: int) -> Expr:
        """Return the integers that a code's axis stands for in each row, int32."""
        stages = self.spec.stages
        if self.mode == "combined":
            weights = self.arrays["combined_weights"]
            unit = (term * stages + stage) * 2 + axis
            return T.cast(self._scale_vector(weights, tile, flush, unit), f"int32x{ROWS}")
        if self.mode == "split" or stage == stages // 2 * 2:
            return T.broadcast(T.int32(1), ROWS)
        # A joint table's entry where the other code of the nibble has nothing on this axis.
        unit = (term * (stages // 2) + stage // 2) * 2 + axis
        alone = 4 if (stage % 2 == 0) == (axis == 0) else 1
        entry = T.cast(self.arrays["joint_tables"][tile, unit, alone], "int32")
        return T.broadcast(T.bind(entry - joint_offset(self.joint_limit)), ROWS)

    def _scale_vector(self, scales: Buffer, tile: Expr, flush: Expr, index: int) -> Expr:
        """Return a scale of each row, from an array of the shape of ``scales``."""
        if self.spec.scale == "row":
            return scales[tile, 0, index, span(0, ROWS)]
        column_tile = flush if self.spec.scale == "tile64" else 0
        return T.broadcast(scales[tile, column_tile, index], ROWS)

    # Products

    def _configure(self) -> None:
        """Load a configuration of palette 1 with eight full tiles; threads each need their own."""
        config = T.alloc_buffer((64,), "uint8")
        store(config, span(0, 64), T.broadcast(T.uint8(0), 64))
        store(config, 0, T.uint8(1))
        for tile in range(_TILES):
            store(config, 16 + 2 * tile, T.uint8(BYTES))
            store(config, 48 + tile, T.uint8(ROWS))
        T.evaluate(_tile_op("ldtilecfg", T.address_of(config[0])))

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
            T.evaluate(_tile_op("tilezero", T.uint8(c)))
        for k in range(self.flush_tiles):
            for t in range(tiles):
                column_tile = (first + i) * self.flush_tiles + k
                at = self.activations.address(column_tile, half, digit, token + t * ROWS)
                T.evaluate(_load(4 + t, at))
            at = (i * self.flush_tiles + k) * (ROWS * BYTES)
            for axis in (0, 1):
                T.evaluate(_load(6 + axis, T.address_of(self.panel[2 * half + axis, at])))
                for t in range(tiles):
                    registers = (axis * tiles + t, 4 + t, 6 + axis)
                    T.evaluate(_tile_op("tdpbssd", *(T.uint8(r) for r in registers)))
        for axis in (0, 1):
            for t in range(tiles):
                target = self.sums[half * self.digits + digit, axis, t * ROWS, 0]
                T.evaluate(
                    _tile_op(
                        "tilestored64",
                        T.uint8(axis * tiles + t),
                        T.address_of(target),
                        T.int64(BYTES),
                    )
                )

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

        Real weights take Re x to Re y and Im x to Im y, imaginary ones the others. Scales that all
        rows share are multiplied for 16 tokens at a time.
        """
        lanes = ROWS
        scales = self.arrays["scales" if self.mode == "split" else f"{self.mode}_scales"]
        weight = [
            T.bind(self._scale_vector(scales, tile, flush, panel.scale + axis)) for axis in (0, 1)
        ]
        group = T.bind(T.floordiv(flush, ACT_GROUP // self.flush))
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


def _tile_op(name: str, *args: Any) -> Expr:
    return T.call_llvm_intrin("void", f"llvm.x86.{name}", *args)


def _load(register: int, address: Expr) -> Expr:
    return _tile_op("tileloadd64", T.uint8(register), address, T.int64(BYTES))


def _add(a: Expr | None, b: Expr | None) -> Expr:
    """Return a + b, None being zero."""
    return b if a is None else a if b is None else a + b


def _subtract(a: Expr | None, b: Expr | None) -> Expr:
    """Return a - b, None being zero."""
    if b is None:
        return a
    return T.broadcast(T.int8(0), BYTES) - b if a is None else a - b
