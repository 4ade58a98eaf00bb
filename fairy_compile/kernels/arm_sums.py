"""TIR of the integer sums of an ARM instruction set: registers of a quad of rows.

By instruction set, p being the pair of rows (register of codes) of the quad:

    i8mm     sums[p]                     int32 [row 2p: re, im | row 2p + 1: re, im]
    dotprod  sums[2 * k + p]             int32 [row 2p: two sums | row 2p + 1: two sums]
    neon     sums[4 * k + 2 * p + r]     row 2p + r; four int32 sums, or eight int16 ones

where re and im are sums of products with Re x and Im x, and k counts the products of the unit;
smmla always makes two. Without a dot product, a product of bytes is int16. Split entries are
-1, 0, 1 and a lane meets one column of each of the 16 blocks of a group, so a sum is at most
16 * 128 = 2048 and stays int16. Joint and combined ones, up to 127 * 128 each, are widened at once.

The two digits of int16 activations are summed apart and put together in int32: two entries of 127,
those of U and W, make at most 128 * 2 * 127 * (256 * 127 + 128) = 1.07e9 < 2^31.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.arm_activations import Activations
from fairy_compile.kernels.arm_tables import ArmLookup
from fairy_compile.kernels.x86_activations import Tokens, span, store
from fairy_compile.kernels.x86_tables import Lookup, Unit

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

    from fairy_compile.kernels.arm import Isa

# Floats of this size are 1 apart, so that adding an integer below 2^22 to the bits adds it to the
# float. Sums that start from its bits become floats by a subtraction, which any vector pipe can do;
# conversions take some cores four times as long. Two entries of 127 times 127, 128 times, fit.
_ONES = 1.5 * 2**23
_ONES_BITS = 0x4B400000

QUAD = 4  # rows of a float32 vector of outputs: two registers of codes, of two rows each


class IntegerSums:
    """Emits the sums of one instruction set."""

    def __init__(self, isa: Isa, floats: bool) -> None:
        self.isa, self.floats = isa, floats

    def start(self, unit: Unit) -> list[Buffer]:
        """Return the accumulators of a quad, for one unit and token."""
        count = self.isa.sums_per_quad * len(unit.products) // 2
        return vectors(count, *self._sum_type(unit), _ONES_BITS if self.floats else 0)

    def operand(
        self, activations: Activations, tokens: Tokens, block: Expr, token: int, digit: int
    ) -> list[Expr]:
        """Return a digit of the activations of a column block as the instruction set wants it."""
        args = (tokens, block, token, digit)
        if self.isa.name == "i8mm":
            conjugates = (False, True) if activations.form == "conjugate" else (False,)
            return [T.bind(activations.both_halves(*args, c)) for c in conjugates]
        load = activations.half_twice if self.isa.name == "dotprod" else activations.half
        return [T.bind(load(*args, half)) for half in (0, 1)]

    def add(
        self,
        unit: Unit,
        look: Lookup,
        sums: list[Buffer],
        pair: int,
        entries: Expr,
        operand: list[Expr],
    ) -> None:
        """Add the products of entries of two rows and activations to the sums of a quad."""
        if self.isa.name == "neon":
            self._add_products(unit, sums, pair, entries, operand)
            return
        if self.isa.name == "i8mm":
            name = "smmla.v4i32.v16i8"
            met = [operand[isinstance(look, ArmLookup) and look.conjugate]]
        else:
            name, met = "sdot.v4i32.v16i8", [operand[p.half] for p in unit.products]
        for number, activations in enumerate(met):
            total = sums[2 * number + pair]
            args = (total[span(0, 4)], entries, activations)
            store(total, span(0, 4), neon("int32x4", name, *args))

    def by_row(self, unit: Unit, sums: list[Buffer]) -> list[Expr]:
        """Return int32x4 sums of the quad's rows, one for each product of the unit."""
        values = self.by_register(unit, sums)
        return halves(values) if self.isa.name == "i8mm" else values

    def by_register(self, unit: Unit, sums: list[Buffer]) -> list[Expr]:
        """Return `by_row`; with i8mm [row: re, im | row: re, im], one for each pair of rows."""
        lanes, dtype = self._sum_type(unit)
        values = [total[span(0, lanes)] for total in sums]
        if self.floats:
            ones = T.broadcast(T.float32(_ONES), QUAD)
            return [T.reinterpret("float32x4", value) - ones for value in values]
        if self.isa.name == "i8mm":
            return values
        if dtype == "int16":
            values = [neon("int32x4", "saddlp.v4i32.v8i16", value) for value in values]
        # Neighbours in a vector, then the vectors' rows side by side.
        while len(values) > len(unit.products):
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [neon("int32x4", "addp.v4i32", *two) for two in pairs]
        return values

    def _sum_type(self, unit: Unit) -> tuple[int, str]:
        """Return (lanes, dtype) of an accumulator."""
        return (8, "int16") if self.isa.name == "neon" and not unit.joint else (4, "int32")

    def _add_products(
        self, unit: Unit, sums: list[Buffer], pair: int, entries: Expr, operand: list[Expr]
    ) -> None:
        for row in (0, 1):
            of_row = T.bind(T.Shuffle([entries], list(range(8 * row, 8 * row + 8))))
            for number, product in enumerate(unit.products):
                total = sums[4 * number + 2 * pair + row]
                value = neon("int16x8", "smull.v8i16", of_row, operand[product.half])
                if unit.joint:
                    value = neon("int32x4", "saddlp.v4i32.v8i16", value)
                at = span(0, self._sum_type(unit)[0])
                store(total, at, total[at] + value)


def neon(dtype: str, name: str, *args: Expr) -> Expr:
    """Return the call of an LLVM intrinsic of NEON."""
    return T.call_llvm_pure_intrin(dtype, f"llvm.aarch64.neon.{name}", *args)


def halves(values: list[Expr]) -> list[Expr]:
    """Return the re and the im lanes of two vectors [row: re, im | row: re, im]."""
    return [T.Shuffle(values, [half, half + 2, half + 4, half + 6]) for half in (0, 1)]


def vectors(count: int, lanes: int, dtype: str, value: int = 0) -> list[Buffer]:
    """Return ``count`` vectors, all lanes of which are ``value``."""
    made = [T.alloc_buffer((lanes,), dtype) for _ in range(count)]
    for vector in made:
        store(vector, span(0, lanes), T.broadcast(getattr(T, dtype)(value), lanes))
    return made
