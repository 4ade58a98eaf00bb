"""TIR of the ARM phase GEMM: the function of one call, for any instruction set of `arm`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.arm_activations import Activations
from fairy_compile.kernels.arm_layout import ARM_LAYOUT, BLOCK, ROWS
from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.x86_activations import Tokens, span, store
from fairy_compile.kernels.x86_tables import (
    Lookup,
    Unit,
    blocks_per_step,
    split_codebook,
)
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase.tensor import TILE

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

    from fairy_compile.kernels.arm import Isa

_QUAD = 4  # rows of a float32 vector of outputs: two registers of codes, of two rows each
_REGISTER = 16  # bytes


@dataclass(frozen=True)
class Pass:
    """What one walk over the codes of a flush sums: the units, for some quads of rows."""

    units: range
    quads: range


class CodebookFunction:
    """Emits one function. Vectors live in small buffers, which LLVM promotes to registers.

    A *flush* is the columns between two changes of scale, when integer sums are scaled into the
    float32 outputs: 64 for tile64 scales, else 128, the group of the activations.
    """

    def __init__(self, isa: Isa, spec: PhaseSpec, batch: Batch, joint: bool, tokens: int) -> None:
        self.isa, self.spec, self.batch = isa, spec, batch
        self.joint, self.tokens = joint, tokens
        split = split_codebook(spec.terms, spec.stages)
        self.book = ARM_LAYOUT.joint_codebook(spec) if joint else split
        self.flush = TILE if spec.scale == "tile64" else ACT_GROUP
        self.step_blocks = blocks_per_step(len(spec.terms), spec.stages)

    def emit(self) -> PrimFunc:
        """Return the PrimFunc."""
        spec = self.spec
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_name(self._name())
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            self.rows = 1 if self.batch == "single" else T.int64()
            x = T.arg("x", T.buffer((self.rows, spec.in_features), "float32"))
            self.arrays = {
                name: T.arg(name, T.buffer(a.shape, a.dtype))
                for name, a in ARM_LAYOUT.arrays(spec).items()
            }
            self.y = T.arg("y", T.buffer((self.rows, spec.out_features), "float32"))
            self.activations = Activations(spec, self.rows)
            if self.batch == "single":
                self.activations.quantize_row(x)
            else:
                self.activations.quantize_rows(x, self.tokens)
            self.flush_steps = T.alloc_buffer((1,), "int32")
            store(self.flush_steps, 0, T.int32(self.flush // (BLOCK * self.step_blocks)))
            self._multiply()
        return ir.get()

    def _name(self) -> str:
        spec = self.spec
        return (
            f"phase_gemm_{self.isa.name}_n{'_'.join(map(str, spec.parts))}_m{spec.m}_t{spec.stages}"
            f"_{''.join(spec.terms).lower()}_{spec.scale}_{'joint' if self.joint else 'split'}"
            f"_{self.batch}"
        )

    def _multiply(self) -> None:
        with T.parallel(0, ARM_LAYOUT.tiles(self.spec)) as tile:
            tables = {look: self._load_table(tile, look) for look in self.book.lookups}
            if self.batch == "single":
                self._multiply_tokens(tile, tables, Tokens(0, 1))
                return
            blocks = T.bind(T.floordiv(self.rows, self.tokens))
            with T.serial(0, blocks) as block:
                first = T.bind(block * self.tokens)
                self._multiply_tokens(tile, tables, Tokens(first, self.tokens))
            if self.tokens > 1:
                with T.serial(0, self.rows - blocks * self.tokens) as left:
                    first = T.bind(blocks * self.tokens + left)
                    self._multiply_tokens(tile, tables, Tokens(first, 1))

    def _load_table(self, tile: Expr, look: Lookup) -> Expr:
        """Return a table; equal ones are merged by LLVM."""
        if self.book.units[look.unit].joint:
            return T.bind(self.arrays["joint_tables"][tile, look.table, span(0, 16)])
        return T.bind(self.arrays["tables"][look.table, span(0, 16)])

    def _multiply_tokens(self, tile: Expr, tables: dict[Lookup, Expr], tokens: Tokens) -> None:
        quads = ROWS // _QUAD
        out = [[_vectors(2, _QUAD, "float32") for _ in range(quads)] for _ in range(tokens.count)]
        flushes = self.activations.groups * ACT_GROUP // self.flush
        with T.serial(0, flushes) as flush:
            for walk in self._passes(tokens.count):
                sums = self._sum(tile, walk, tables, tokens, flush)
                for (unit, quad), by_token in sums.items():
                    self._scale_sums(tile, unit, quad, by_token, tokens, flush, out)
        self._store(tile, tokens, out)

    def _passes(self, tokens: int) -> list[Pass]:
        """Split units and quads into passes whose sums fit the registers; codes stay in L1."""
        units, quads = len(self.book.units), ROWS // _QUAD
        # Units of one product have half the sums, but as many look-ups in flight.
        fit = max(1, self.isa.sums // (self.isa.sums_per_quad * tokens))
        some_units = min(fit, units)
        some_quads = max(1, min(fit // some_units, quads))
        return [
            Pass(range(u, min(u + some_units, units)), range(q, q + some_quads))
            for q in range(0, quads, some_quads)
            for u in range(0, units, some_units)
        ]

    def _sum(
        self, tile: Expr, walk: Pass, tables: dict[Lookup, Expr], tokens: Tokens, flush: Expr
    ) -> dict[tuple[int, int], list[list[Buffer]]]:
        """Return (unit, quad) -> [token] -> integer sums over the columns of a flush."""
        sums = {
            (unit, quad): [self._zero_sums(self.book.units[unit]) for _ in range(tokens.count)]
            for unit, quad in itertools.product(walk.units, walk.quads)
        }
        used = [look for look in self.book.lookups if look.unit in walk.units]
        # Out of memory, where LLVM cannot see that it is 16 or less: it would unroll the loop whole
        # and then run out of registers, which cost a quarter to a half of the speed.
        flush_steps = T.bind(self.flush_steps[0])
        with T.serial(0, flush_steps) as i:
            step = T.bind(flush * flush_steps + i)
            operands = {
                (block, t): self._operand(tokens, step * self.step_blocks + block, t)
                for block in sorted({look.block for look in used})
                for t in range(tokens.count)
            }
            for quad, pair in itertools.product(walk.quads, (0, 1)):
                register = 2 * quad + pair
                nibbles = sorted({look.nibble for look in used})
                indices = {n: self._index(tile, step, n, register) for n in nibbles}
                for look in used:
                    entries = T.bind(_tbl(tables[look], indices[look.nibble]))
                    for t, accumulators in enumerate(sums[look.unit, quad]):
                        operand = operands[look.block, t]
                        self._add(self.book.units[look.unit], accumulators, pair, entries, operand)
        return sums

    def _index(self, tile: Expr, step: Expr, nibble: int, register: int) -> Expr:
        """Return a nibble of a register of codes, as tbl's index."""
        at = span(register * _REGISTER, _REGISTER)
        codes = self.arrays["codes"][tile, step, nibble // 2, at]
        if nibble % 2:
            codes = T.shift_right(codes, T.broadcast(T.uint8(4), _REGISTER))
        else:
            codes = T.bitwise_and(codes, T.broadcast(T.uint8(15), _REGISTER))
        return T.bind(T.reinterpret("int8x16", codes))

    # Integer sums of a quad, by instruction set, p being the pair of rows (register) of the quad:
    #
    #   i8mm     sums[p]                     int32 [row 2p: re, im | row 2p + 1: re, im]
    #   dotprod  sums[2 * k + p]             int32 [row 2p: two sums | row 2p + 1: two sums]
    #   neon     sums[4 * k + 2 * p + r]     row 2p + r; four int32 sums, or eight int16 ones
    #
    # where re and im are sums of products with Re x and Im x, and k counts the products of the
    # unit; smmla always makes two. Without a dot product, a product of bytes is int16. Split
    # entries are -1, 0, 1 and a lane meets one column of each of the 16 blocks of a group, so a sum
    # is at most 16 * 127 = 2032 and stays int16. Joint ones, up to 127 * 127 each, are widened at
    # once.

    def _sum_count(self, unit: Unit) -> int:
        """Return how many accumulators a quad takes, for one unit and token."""
        return self.isa.sums_per_quad * len(unit.products) // 2

    def _zero_sums(self, unit: Unit) -> list[Buffer]:
        """Return the accumulators of a quad, for one unit and token."""
        return _vectors(self._sum_count(unit), *self._sum_type(unit))

    def _sum_type(self, unit: Unit) -> tuple[int, str]:
        """Return (lanes, dtype) of an accumulator."""
        return (8, "int16") if self.isa.name == "neon" and not unit.joint else (4, "int32")

    def _operand(self, tokens: Tokens, block: Expr, token: int) -> list[Expr]:
        """Return the activations of a column block as the instruction set wants them."""
        args, halves = (tokens, block, token), (0, 1)
        if self.isa.name == "i8mm":
            return [T.bind(self.activations.both_halves(*args))]
        if self.isa.name == "dotprod":
            return [T.bind(self.activations.half_twice(*args, half)) for half in halves]
        return [T.bind(self.activations.half(*args, half)) for half in halves]

    def _add(
        self, unit: Unit, sums: list[Buffer], pair: int, entries: Expr, operand: list[Expr]
    ) -> None:
        """Add the products of entries of two rows and activations to the sums of a quad."""
        if self.isa.name == "neon":
            self._add_products(unit, sums, pair, entries, operand)
            return
        if self.isa.name == "i8mm":
            name, met = "smmla.v4i32.v16i8", operand
        else:
            name, met = "sdot.v4i32.v16i8", [operand[p.half] for p in unit.products]
        for number, activations in enumerate(met):
            total = sums[2 * number + pair]
            args = (total[span(0, 4)], entries, activations)
            store(total, span(0, 4), _neon("int32x4", name, *args))

    def _add_products(
        self, unit: Unit, sums: list[Buffer], pair: int, entries: Expr, operand: list[Expr]
    ) -> None:
        for row in (0, 1):
            of_row = T.bind(T.Shuffle([entries], list(range(8 * row, 8 * row + 8))))
            for number, product in enumerate(unit.products):
                total = sums[4 * number + 2 * pair + row]
                value = _neon("int16x8", "smull.v8i16", of_row, operand[product.half])
                if unit.joint:
                    value = _neon("int32x4", "saddlp.v4i32.v8i16", value)
                at = span(0, self._sum_type(unit)[0])
                store(total, at, total[at] + value)

    def _quad_sums(self, unit: Unit, sums: list[Buffer]) -> list[Expr]:
        """Return int32x4 sums of the quad's rows, one for each product of the unit."""
        lanes, dtype = self._sum_type(unit)
        values = [total[span(0, lanes)] for total in sums]
        if self.isa.name == "i8mm":
            return [T.Shuffle(values, [half, half + 2, half + 4, half + 6]) for half in (0, 1)]
        if dtype == "int16":
            values = [_neon("int32x4", "saddlp.v4i32.v8i16", value) for value in values]
        # Neighbours in a vector, then the vectors' rows side by side.
        while len(values) > len(unit.products):
            values = [_neon("int32x4", "addp.v4i32", *two) for two in _pairs(values)]
        return values

    def _scale_sums(
        self,
        tile: Expr,
        index: int,
        quad: int,
        by_token: list[list[Buffer]],
        tokens: Tokens,
        flush: Expr,
        out: list[list[list[Buffer]]],
    ) -> None:
        """Add a unit's sums, scaled, to the outputs of a quad of rows."""
        unit, at = self.book.units[index], span(0, _QUAD)
        scales = self.arrays["joint_scales" if self.joint else "scales"]
        if self.spec.scale == "row":
            scale = scales[tile, 0, index, span(quad * _QUAD, _QUAD)]
        else:
            column_tile = flush if self.spec.scale == "tile64" else 0
            scale = T.broadcast(scales[tile, column_tile, index], _QUAD)
        group = T.floordiv(flush, ACT_GROUP // self.flush)
        for t, sums in enumerate(by_token):
            for product, total in zip(unit.products, self._quad_sums(unit, sums), strict=True):
                q_scale = self.activations.scale(tokens, group, t, product.half)
                value = T.cast(total, "float32x4") * (scale * T.broadcast(q_scale, _QUAD))
                target = out[t][quad][product.output]
                store(target, at, target[at] - value if product.negative else target[at] + value)

    # Outputs

    def _store(self, tile: Expr, tokens: Tokens, out: list[list[list[Buffer]]]) -> None:
        """Store a row tile: as vectors, or row by row where an uneven part ends in a quad."""
        re, im, left = (T.bind(v) for v in self._position(tile))
        whole_tiles = all(n % ROWS == 0 for n in self.spec.parts)
        for t, quads in enumerate(out):
            token = tokens.first + t
            for quad, pair in enumerate(quads):
                row = quad * _QUAD
                for first, vector in zip((re, im), pair, strict=True):
                    if whole_tiles:
                        store(self.y, (token, span(first + row, _QUAD)), vector[span(0, _QUAD)])
                        continue
                    with T.If(left >= row + _QUAD):
                        with T.Then():
                            store(self.y, (token, span(first + row, _QUAD)), vector[span(0, _QUAD)])
                        with T.Else(), T.serial(0, T.max(left - row, 0)) as i:
                            store(self.y, (token, first + row + i), vector[i])

    def _position(self, tile: Expr) -> tuple[Expr, Expr, Expr]:
        """Return a tile's first Re and Im output features, and the rows left in its part."""
        first_tile = 0
        position: tuple[Any, Any, Any] | None = None
        for _, rows, feature in self.spec.output_runs():
            row = (tile - first_tile) * ROWS
            here = (feature + row, feature + rows + row, rows - row)
            if position is not None:
                both = zip(here, position, strict=True)
                here = tuple(T.Select(tile >= first_tile, new, old) for new, old in both)
            position = here
            first_tile += -(-rows // ROWS)
        return position


def _neon(dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, f"llvm.aarch64.neon.{name}", *args)


def _tbl(table: Expr, index: Expr) -> Expr:
    return _neon("int8x16", "tbl1.v16i8", table, index)


def _pairs(values: list[Expr]) -> list[tuple[Expr, Expr]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _vectors(count: int, lanes: int, dtype: str) -> list[Buffer]:
    """Return ``count`` vectors of zeros."""
    vectors = [T.alloc_buffer((lanes,), dtype) for _ in range(count)]
    for vector in vectors:
        store(vector, span(0, lanes), T.broadcast(getattr(T, dtype)(0), lanes))
    return vectors
