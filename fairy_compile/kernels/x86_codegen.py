"""TIR of the x86 phase GEMM: the function of one call, for any instruction set of `x86`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.x86_activations import (
    Activations,
    Tokens,
    add_neighbours,
    dot,
    each_block,
    join_digits,
    multiply_pairs,
    span,
    store,
)
from fairy_compile.kernels.x86_layout import BLOCK, X86Layout
from fairy_compile.kernels.x86_outputs import RowTileOutputs
from fairy_compile.kernels.x86_panel_layout import TableMode
from fairy_compile.kernels.x86_tables import (
    SPLIT_OFFSET,
    Lookup,
    Unit,
    blocks_per_step,
    combined_codebook,
    joint_offset,
    split_codebook,
)
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase.tensor import TILE

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

    from fairy_compile.kernels.x86 import Isa

_SCALES = {"combined": "combined_table_scales", "joint": "joint_scales", "split": "scales"}
_PREFETCH_L2 = 2  # LLVM's temporal locality: 3 is L1, 2 is L2


class WideMultiply(Protocol):
    """What multiplies many rows of x by other instructions than one row.

    Attributes:
        mode: what it makes of the codes.
    """

    mode: TableMode

    def usable(self) -> Expr:
        """Return whether `emit` serves the call, as a condition that the function evaluates."""

    def emit(self) -> None:
        """Emit quantisation and multiplication."""


class CodebookFunction:
    """Emits one function. Vectors live in small buffers, which LLVM promotes to registers.

    A *flush* is the columns between two changes of scale, when integer sums are scaled into the
    float32 outputs: 64 for tile64 scales, else 128, the group of the activations.
    """

    def __init__(
        self,
        isa: Isa,
        layout: X86Layout,
        spec: PhaseSpec,
        batch: Batch,
        tables: TableMode,
        tokens: int,
        prefetch: int,
        wide: Callable[[CodebookFunction], WideMultiply] | None = None,
    ) -> None:
        self.isa, self.layout, self.spec, self.batch = isa, layout, spec, batch
        self.tables, self.tokens, self.prefetch = tables, tokens, prefetch
        self.wide = wide
        if tables == "combined":
            self.book = combined_codebook()
        elif tables == "joint":
            self.book = layout.joint_codebook(spec)
        else:
            self.book = split_codebook(spec.terms, spec.stages)
        self.flush = TILE if spec.scale == "tile64" else ACT_GROUP
        self.step_blocks = blocks_per_step(len(spec.terms), spec.stages)

    def emit(self) -> PrimFunc:
        """Return the PrimFunc."""
        spec = self.spec
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            rows = 1 if self.batch == "single" else T.int64()
            self.rows = rows
            self.x = T.arg("x", T.buffer((rows, spec.in_features), "float32"))
            self.arrays = {
                name: T.arg(name, T.buffer(a.shape, a.dtype))
                for name, a in self.layout.arrays(spec).items()
            }
            self.y = T.arg("y", T.buffer((rows, spec.out_features), "float32"))
            modes: list[str] = [self.tables]
            if self.wide is None:
                self._emit_codebook()
            else:
                wide = self.wide(self)
                modes.insert(0, wide.mode)
                with T.If(wide.usable()):
                    with T.Then():
                        wide.emit()
                    with T.Else():
                        self._emit_codebook()
            T.func_name(self._name(modes))
        return ir.get()

    def _emit_codebook(self) -> None:
        self.activations = Activations(self.spec, self.rows, self.flush)
        self.activations.quantize(self.x, self.tokens)
        self._multiply()

    def _name(self, modes: list[str]) -> str:
        spec = self.spec
        return (
            f"phase_gemm_{self.isa.name}_n{'_'.join(map(str, spec.parts))}_m{spec.m}_t{spec.stages}"
            f"_{''.join(spec.terms).lower()}_{spec.scale}_{'_'.join(modes)}"
            f"_{spec.act}_{self.batch}"
        )

    def _multiply(self) -> None:
        with T.parallel(0, self.layout.tiles(self.spec)) as tile:
            self.outputs = RowTileOutputs(self.spec, self.isa.rows, self.y, tile)
            tables = {look: self.load_table(tile, look) for look in self.book.lookups}
            each_block(
                self.rows, self.tokens, lambda tokens: self._multiply_tokens(tile, tables, tokens)
            )

    def load_table(self, tile: Expr, look: Lookup, signed: bool = False) -> Expr:
        """Return a table of 16 repeated over a vector; equal ones are merged by LLVM.

        Args:
            tile: row tile.
            look: what looks it up.
            signed: take off the offset that makes entries unsigned.
        """
        unit = self.book.units[look.unit]
        if unit.joint:
            table = self.arrays[f"{self.tables}_tables"][tile, look.table, span(0, 16)]
        else:
            table = self.arrays["tables"][look.table, span(0, 16)]
        if signed:
            table = T.bind(table - T.broadcast(T.uint8(self._offset(unit)), 16))
        width = self.isa.width
        return T.bind(T.Shuffle([table] * (width // 16), list(range(width))))

    def _multiply_tokens(self, tile: Expr, tables: dict[Lookup, Expr], tokens: Tokens) -> None:
        lanes = self.isa.rows
        out = [_vectors(2, lanes, "float32") for _ in range(tokens.count)]
        with T.serial(0, self.activations.flushes) as flush:
            for number, units in enumerate(self._passes(tokens.count)):
                sums = self._sum_units(tile, units, tables, tokens, flush, prefetch=number == 0)
                for unit in units:
                    self._scale_sums(tile, unit, sums[unit], tokens, flush, out)
        for t, halves in enumerate(out):
            self.outputs.store(tokens.first + t, halves)

    def _passes(self, tokens: int) -> list[range]:
        """Split the units into passes whose sums fit the registers; a pass rereads codes in L1."""
        products = max(len(unit.products) for unit in self.book.units)
        size = max(1, self.isa.sums // (products * self.activations.digits * tokens))
        units = len(self.book.units)
        return [range(i, min(i + size, units)) for i in range(0, units, size)]

    def _sum_units(
        self,
        tile: Expr,
        units: range,
        tables: dict[Lookup, Expr],
        tokens: Tokens,
        flush: Expr,
        prefetch: bool,
    ) -> dict[int, list[list[Buffer]]]:
        """Return unit -> [token][(product, digit)] integer sums over the columns of a flush."""
        digits = range(self.activations.digits)
        products = {u: self.book.units[u].products for u in units}
        sums = {
            u: [
                _vectors(len(products[u]) * len(digits), *self._sum_type(self.book.units[u]))
                for _ in range(tokens.count)
            ]
            for u in units
        }
        used = [entry for entry in self.book.entries if entry.unit in units]
        lookups = sorted({i for entry in used for i in entry.lookups})
        flush_steps = self.flush // (BLOCK * self.step_blocks)
        with T.serial(0, flush_steps) as i:
            step = T.bind(flush * flush_steps + i)
            if prefetch:
                self.prefetch_codes(tile, step)
            words = {
                (b, t, half): [
                    self._activation_word(tokens, step * self.step_blocks + b, t, half, digit)
                    for digit in digits
                ]
                for b in sorted({entry.block for entry in used})
                for t in range(tokens.count)
                for half in sorted({p.half for unit in products.values() for p in unit})
            }
            nibbles = sorted({self.book.lookups[k].nibble for k in lookups})
            indices = {n: self.index(tile, step, n) for n in nibbles}
            # A look-up of one entry stands right before its products, so that it needs a register
            # for a short while only.
            found: dict[int, Expr] = {}
            for entry in used:
                for k in entry.lookups:
                    if k not in found:
                        found[k] = self.look_up(self.book.lookups[k], tables, indices)
                value, *more = (found[k] for k in entry.lookups)
                for other in more:
                    value = T.bind(value - other if entry.minus else value + other)
                for t, totals in enumerate(sums[entry.unit]):
                    met = [w for p in products[entry.unit] for w in words[entry.block, t, p.half]]
                    for total, word in zip(totals, met, strict=True):
                        self._add_dot(self.book.units[entry.unit], total, value, word)
        return sums

    def look_up(self, look: Lookup, tables: dict[Lookup, Expr], indices: dict[int, Expr]) -> Expr:
        """Return the entries that a step's codes look up, from `load_table` at `index`."""
        args = (tables[look], indices[look.nibble])
        return T.bind(T.call_llvm_pure_intrin(f"int8x{self.isa.width}", self.isa.shuffle, *args))

    def prefetch_codes(self, tile: Expr, step: Expr) -> None:
        """Prefetch codes of this or a later row tile, if asked to; past the end it does nothing.

        Into L2 (prefetcht1): fetching into L1 holds one of its few fill buffers for the whole trip
        from memory, and measured 12.3 against 9.4 GB/s of codes on one Sapphire Rapids core.
        """
        if not self.prefetch:
            return
        codes = self.arrays["codes"]
        planes = int(codes.shape[2])
        ahead = self.prefetch // (planes * self.isa.width)
        for plane in range(planes):
            address = T.address_of(codes[tile, step + ahead, plane, 0])
            T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, _PREFETCH_L2, 1))

    def _activation_word(
        self, tokens: Tokens, block: Expr, token: int, half: int, digit: int
    ) -> Expr:
        """Return a digit of the activations of a column block, repeated for every row."""
        word = self.activations.word(tokens, block, token, half, digit)
        return T.bind(T.reinterpret(f"int8x{self.isa.width}", T.broadcast(word, self.isa.rows)))

    def index(self, tile: Expr, step: Expr, nibble: int) -> Expr:
        """Return the shuffle's index vector for a nibble.

        vpermb looks at six bits, and its table holds the sixteen entries four times over, so bits
        above the nibble do not matter to it, nor that shifting 16-bit lanes mixes two bytes.
        """
        width = self.isa.width
        codes = self.arrays["codes"][tile, step, nibble // 2, span(0, width)]
        if nibble % 2:
            pairs = T.reinterpret(f"uint16x{width // 2}", codes)
            pairs = T.shift_right(pairs, T.broadcast(T.uint16(4), width // 2))
            codes = T.reinterpret(f"uint8x{width}", pairs)
        if self.isa.masked_index:
            codes = T.bitwise_and(codes, T.broadcast(T.uint8(15), width))
        return T.bind(T.reinterpret(f"int8x{width}", codes))

    # Integer sums. With a dot product instruction they are int32. AVX2 multiplies bytes and adds
    # neighbours into int16. Split tables hold 0, 1, 2, so such a pair is at most 2 * 2 * 128 = 512
    # in size, and a group of 128 columns adds one pair per block of 4 columns to each of a row's
    # two lanes: 32 * 512 = 16384 at most, so int16 sums hold a flush. Joint pairs are widened to
    # int32 at once. The two digits of int16 activations are summed apart and put together in int32:
    # entries up to 255 make at most 128 * 255 * (256 * 127 + 128) = 1.07e9 < 2^31.

    def _sum_type(self, unit: Unit) -> tuple[int, str]:
        """Return (lanes, dtype) of a unit's sums."""
        if self.isa.dot or unit.joint:
            return self.isa.rows, "int32"
        return 2 * self.isa.rows, "int16"

    def _add_dot(self, unit: Unit, total: Buffer, entries: Expr, word: Expr) -> None:
        """Add dot products of unsigned entries and signed activations to ``total``."""
        lanes, dtype = self._sum_type(unit)
        at = span(0, lanes)
        if dtype == "int16":
            value = total[at] + multiply_pairs(self.isa, entries, word)
        else:
            value = dot(self.isa, total[at], entries, word)
        store(total, at, value)

    def _scale_sums(
        self,
        tile: Expr,
        index: int,
        by_token: list[list[Buffer]],
        tokens: Tokens,
        flush: Expr,
        out: list[list[Buffer]],
    ) -> None:
        """Take the tables' offset off a unit's sums, and add them, scaled, to the outputs."""
        rows, unit = self.isa.rows, self.book.units[index]
        at, (lanes, dtype) = span(0, rows), self._sum_type(unit)
        table_offset, scale = self._offset(unit), self.scale(tile, flush, index)
        digits = self.activations.digits
        for t, totals in enumerate(by_token):
            for number, product in enumerate(unit.products):
                own = totals[number * digits : (number + 1) * digits]
                sums = [v[span(0, lanes)] for v in own]
                if dtype == "int16":
                    sums = [add_neighbours(self.isa, v) for v in sums]
                value = join_digits(sums, rows)
                offset = self.activations.sum(tokens, flush, t, product.half) * table_offset
                value = T.cast(value - T.broadcast(offset, rows), f"float32x{rows}")
                q_scale = self.activations.scale(tokens, flush, t, product.half)
                value = value * (scale * T.broadcast(q_scale, rows))
                target = out[t][product.output]
                store(target, at, target[at] - value if product.negative else target[at] + value)

    def scale(self, tile: Expr, flush: Expr, unit: int) -> Expr:
        """Return the scale of a unit's sums of a flush, for each row of the tile."""
        scales = self.arrays[_SCALES[self.tables]]
        if self.spec.scale == "row":
            return scales[tile, 0, unit, span(0, self.isa.rows)]
        column_tile = flush if self.spec.scale == "tile64" else 0
        return T.broadcast(scales[tile, column_tile, unit], self.isa.rows)

    def _offset(self, unit: Unit) -> int:
        """Return what makes the entries of a unit's tables unsigned."""
        return joint_offset(self.isa.joint_limit) if unit.joint else SPLIT_OFFSET


def _vectors(count: int, lanes: int, dtype: str) -> list[Buffer]:
    """Return ``count`` vectors of zeros."""
    vectors = [T.alloc_buffer((lanes,), dtype) for _ in range(count)]
    for vector in vectors:
        store(vector, span(0, lanes), T.broadcast(getattr(T, dtype)(0), lanes))
    return vectors
