"""TIR of the ARM phase GEMM: the function of one call, for any instruction set of `arm`."""

from __future__ import annotations

import functools
import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.arm_activations import Activations, Form
from fairy_compile.kernels.arm_layout import ARM_LAYOUT, BLOCK, ROWS
from fairy_compile.kernels.arm_sums import QUAD, IntegerSums, halves, neon, vectors
from fairy_compile.kernels.arm_tables import CombinedCodebook, combined_codebook, has_signs
from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.x86_activations import (
    DIGITS,
    Tokens,
    each_block,
    join_digits,
    span,
    store,
)
from fairy_compile.kernels.x86_tables import (
    Codebook,
    Lookup,
    blocks_per_step,
    joint_codebook,
    split_codebook,
)
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase.tensor import TILE

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

    from fairy_compile.kernels.arm import Isa, TableMode

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

    def __init__(
        self, isa: Isa, spec: PhaseSpec, batch: Batch, mode: TableMode, tokens: int
    ) -> None:
        self.isa, self.spec, self.batch = isa, spec, batch
        self.mode, self.tokens = mode, tokens
        self.digits = DIGITS[spec.act]
        # Floats count to 2^22, which is enough for one digit.
        in_floats = mode == "combined" and isa.name == "i8mm" and self.digits == 1
        self.sums = IntegerSums(isa, floats=in_floats)
        self.book = codebook(spec, mode, isa.terms)
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
            self.activations = Activations(spec, self.rows, self._form())
            self.activations.quantize(x, self.tokens)
            self.flush_steps = T.alloc_buffer((1,), "int64")
            store(self.flush_steps, 0, T.int64(self.flush // (BLOCK * self.step_blocks)))
            self._multiply()
        return ir.get()

    def _form(self) -> Form:
        if self.isa.name == "i8mm":
            return "conjugate" if self.mode == "combined" else "halves"
        # Blocks of tokens had rather keep more of them in the L1 cache.
        return "twice" if self.isa.name == "dotprod" and self.batch == "single" else "halves"

    def _name(self) -> str:
        spec = self.spec
        return (
            f"phase_gemm_{self.isa.name}_n{'_'.join(map(str, spec.parts))}_m{spec.m}_t{spec.stages}"
            f"_{''.join(spec.terms).lower()}_{spec.scale}_{self.mode}_{spec.act}"
            f"_{self.batch}"
        )

    def _multiply(self) -> None:
        with T.parallel(0, ARM_LAYOUT.tiles(self.spec)) as tile:
            tables = {look: self._load_table(tile, look) for look in self.book.lookups}
            each_block(
                self.rows, self.tokens, lambda tokens: self._multiply_tokens(tile, tables, tokens)
            )

    def _load_table(self, tile: Expr, look: Lookup) -> Expr:
        """Return a table; equal ones are merged by LLVM."""
        if self.mode == "combined":
            tables = self.arrays["combined_tables"]
            return T.bind(tables[tile, self.isa.terms, look.table, span(0, 16)])
        if self.book.units[look.unit].joint:
            return T.bind(self.arrays["joint_tables"][tile, look.table, span(0, 16)])
        return T.bind(self.arrays["tables"][look.table, span(0, 16)])

    def _multiply_tokens(self, tile: Expr, tables: dict[Lookup, Expr], tokens: Tokens) -> None:
        every_quad = [(t, quad) for t in range(tokens.count) for quad in range(ROWS // QUAD)]
        if self.mode == "combined":
            totals = {
                (*at, unit): vectors(2 if self.isa.name == "i8mm" else 1, QUAD, "float32")
                for at, unit in itertools.product(every_quad, range(len(self.book.units)))
            }
        else:
            out = {at: vectors(2, QUAD, "float32") for at in every_quad}
        flushes = self.activations.groups * ACT_GROUP // self.flush
        with T.serial(0, T.int64(flushes)) as flush:
            for walk in self._passes(tokens.count):
                sums = self._sum(tile, walk, tables, tokens, flush)
                for (unit, quad), by_token in sums.items():
                    for t, of_token in enumerate(by_token):
                        if self.mode == "combined":
                            total = totals[t, quad, unit]
                            self._add_total(unit, of_token, tokens, t, flush, total)
                        else:
                            of_quad = out[t, quad]
                            self._scale_sums(tile, unit, quad, of_token, tokens, t, flush, of_quad)
        at = span(0, QUAD)
        if self.mode == "combined":
            values = {(t, quad): self._share(tile, totals, t, quad) for t, quad in every_quad}
        else:
            values = {key: [vector[at] for vector in pair] for key, pair in out.items()}
        self._store(tile, tokens, values)

    def _passes(self, tokens: int) -> list[Pass]:
        """Split units and quads into passes whose sums fit the registers; codes stay in L1."""
        units, quads = len(self.book.units), ROWS // QUAD
        # Units of one product have half the sums, but as many look-ups in flight.
        fit = max(1, self.isa.sums // (self.isa.sums_per_quad * tokens * self.digits))
        some_units = min(fit, units)
        # Of combined units, one: the float totals of both quads want registers, too.
        some_quads = 1 if self.mode == "combined" else max(1, min(fit // some_units, quads))
        return [
            Pass(range(u, min(u + some_units, units)), range(q, q + some_quads))
            for q in range(0, quads, some_quads)
            for u in range(0, units, some_units)
        ]

    def _sum(
        self, tile: Expr, walk: Pass, tables: dict[Lookup, Expr], tokens: Tokens, flush: Expr
    ) -> dict[tuple[int, int], list[list[list[Buffer]]]]:
        """Return (unit, quad) -> [token][digit] -> integer sums over the columns of a flush."""
        digits = range(self.digits)
        sums = {
            (unit, quad): [
                [self.sums.start(self.book.units[unit]) for _ in digits]
                for _ in range(tokens.count)
            ]
            for unit, quad in itertools.product(walk.units, walk.quads)
        }
        used = [look for look in self.book.lookups if look.unit in walk.units]
        # Out of memory, where LLVM cannot see that it is 16 or less: it would unroll the loop whole
        # and then run out of registers, which cost a quarter to a half of the speed. It may see
        # that the loop is never empty, though, and needs no code for that case.
        flush_steps = T.bind(T.max(self.flush_steps[0], T.int64(1)))
        with T.serial(0, flush_steps) as i:
            step = T.bind(flush * flush_steps + i)
            operands = {
                (block, t, digit): self.sums.operand(
                    self.activations, tokens, step * self.step_blocks + block, t, digit
                )
                for block in sorted({look.block for look in used})
                for t in range(tokens.count)
                for digit in digits
            }
            for quad, pair in itertools.product(walk.quads, (0, 1)):
                register = 2 * quad + pair
                nibbles = sorted({look.nibble for look in used})
                indices = {n: self._index(tile, step, n, register) for n in nibbles}
                for look in used:
                    entries = T.bind(
                        neon("int8x16", "tbl1.v16i8", tables[look], indices[look.nibble])
                    )
                    for t, by_digit in enumerate(sums[look.unit, quad]):
                        for digit, accumulators in enumerate(by_digit):
                            met = operands[look.block, t, digit]
                            unit = self.book.units[look.unit]
                            self.sums.add(unit, look, accumulators, pair, entries, met)
        return sums

    def _index(self, tile: Expr, step: Expr, nibble: int, register: int) -> Expr:
        """Return a nibble of a register of codes, as tbl's index."""

        def shifted(bits: int) -> Expr:
            return T.shift_right(codes, T.broadcast(T.uint8(bits), _REGISTER))

        def masked(value: Expr, mask: int) -> Expr:
            return T.bitwise_and(value, T.broadcast(T.uint8(mask), _REGISTER))

        at = span(register * _REGISTER, _REGISTER)
        codes = self.arrays["codes"][tile, step, nibble // 2, at]
        if has_signs(self.spec) and self.mode != "combined":
            # The signs of a term, see `sign_bytes`: the low two bits with the high two, for U.
            if nibble == 0:
                index = neon("uint8x16", "vsli.v16i8", codes, shifted(6), T.int32(2))
            else:
                index = masked(shifted(2), 15)
        else:
            index = shifted(4) if nibble % 2 else masked(codes, 15)
        return T.bind(T.reinterpret("int8x16", index))

    # Sums to outputs

    def _add_total(
        self,
        index: int,
        sums: list[list[Buffer]],
        tokens: Tokens,
        token: int,
        flush: Expr,
        totals: list[Buffer],
    ) -> None:
        """Add a combined unit's sums, times the scales of activations, to its float totals."""
        unit, at = self.book.units[index], span(0, QUAD)
        by_digit = [self.sums.by_register(unit, of_digit) for of_digit in sums]
        for number, value in enumerate(_join(by_digit)):
            if self.isa.name == "i8mm":
                scale = self.activations.both_scales(tokens, flush, token)
            else:
                half = unit.products[number].half
                scale = T.broadcast(self.activations.scale(tokens, flush, token, half), QUAD)
            total = totals[number]
            store(total, at, total[at] + T.cast(value, "float32x4") * scale)

    def _share(
        self, tile: Expr, totals: dict[tuple[int, int, int], list[Buffer]], token: int, quad: int
    ) -> list[Expr]:
        """Return a quad's re and im outputs, from the totals of combined units."""
        scales = self.arrays["combined_scales"]
        outputs = [[], []]
        for index, unit in enumerate(self.book.units):
            values = [total[span(0, QUAD)] for total in totals[token, quad, index]]
            values = halves(values) if self.isa.name == "i8mm" else values
            for number, value in zip(range(len(unit.products)), values, strict=True):
                for share in self.book.shares[index, number]:
                    scale = scales[tile, self.isa.terms, share.scale]
                    scale = T.broadcast(-scale if share.negative else scale, QUAD)
                    outputs[share.output].append(value * scale)
        return [T.bind(functools.reduce(operator.add, terms)) for terms in outputs]

    def _scale_sums(
        self,
        tile: Expr,
        index: int,
        quad: int,
        sums: list[list[Buffer]],
        tokens: Tokens,
        token: int,
        flush: Expr,
        out: list[Buffer],
    ) -> None:
        """Add a unit's sums, scaled, to the outputs of a quad of rows."""
        unit, at = self.book.units[index], span(0, QUAD)
        scales = self.arrays["joint_scales" if self.mode == "joint" else "scales"]
        if self.spec.scale == "row":
            scale = scales[tile, 0, index, span(quad * QUAD, QUAD)]
        else:
            column_tile = flush if self.spec.scale == "tile64" else 0
            scale = T.broadcast(scales[tile, column_tile, index], QUAD)
        group = T.floordiv(flush, ACT_GROUP // self.flush)
        by_digit = [self.sums.by_row(unit, of_digit) for of_digit in sums]
        for product, total in zip(unit.products, _join(by_digit), strict=True):
            q_scale = self.activations.scale(tokens, group, token, product.half)
            value = T.cast(total, "float32x4") * (scale * T.broadcast(q_scale, QUAD))
            target = out[product.output]
            store(target, at, target[at] - value if product.negative else target[at] + value)

    # Outputs

    def _store(self, tile: Expr, tokens: Tokens, values: dict[tuple[int, int], list[Expr]]) -> None:
        """Store a row tile: as vectors, or row by row where an uneven part ends in a quad."""
        re, im, left = (T.bind(v) for v in self._position(tile))
        whole_tiles = all(n % ROWS == 0 for n in self.spec.parts)
        for (t, quad), pair in values.items():
            token, row = tokens.first + t, quad * QUAD
            for first, value in zip((re, im), pair, strict=True):
                if whole_tiles:
                    store(self.y, (token, span(first + row, QUAD)), value)
                    continue
                vector = T.alloc_buffer((QUAD,), "float32")
                store(vector, span(0, QUAD), value)
                with T.If(left >= row + QUAD):
                    with T.Then():
                        store(self.y, (token, span(first + row, QUAD)), vector[span(0, QUAD)])
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


def _join(by_digit: list[list[Expr]]) -> list[Expr]:
    """Return sums of activations, of sums of their digits; of one digit they may be floats."""
    if len(by_digit) == 1:
        return by_digit[0]
    return [T.bind(join_digits(digits, QUAD)) for digits in zip(*by_digit, strict=True)]


def codebook(spec: PhaseSpec, mode: TableMode, terms: int) -> Codebook | CombinedCodebook:
    """Return the codebook of a table mode, and of combined tables ``terms``."""
    if mode == "combined":
        return combined_codebook(spec, terms)
    book = joint_codebook if mode == "joint" else split_codebook
    return book(spec.terms, spec.stages)
