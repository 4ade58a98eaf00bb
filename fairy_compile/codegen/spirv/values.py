"""Values and what can be computed with them, lane by lane.

A TIR vector may have any number of lanes; a SPIR-V vector has at most four. A `Value` therefore
holds its lanes in parts of four, and every operation works part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fairy_compile.codegen.spirv.dtypes import BOOL, INT32, UINT32, DType, Kind
from fairy_compile.codegen.spirv.enums import Glsl, Op
from fairy_compile.codegen.spirv.function import FunctionBuilder

_INT, _UINT, _FLOAT, _BOOL = Kind.INT, Kind.UINT, Kind.FLOAT, Kind.BOOL

# Operation -> kind of its operands -> opcode. A missing kind is not supported.
ARITHMETIC: dict[str, dict[Kind, Op]] = {
    "Add": {_INT: Op.IAdd, _UINT: Op.IAdd, _FLOAT: Op.FAdd},
    "Sub": {_INT: Op.ISub, _UINT: Op.ISub, _FLOAT: Op.FSub},
    "Mul": {_INT: Op.IMul, _UINT: Op.IMul, _FLOAT: Op.FMul},
    "Div": {_INT: Op.SDiv, _UINT: Op.UDiv, _FLOAT: Op.FDiv},
    "Mod": {_UINT: Op.UMod, _FLOAT: Op.FRem},
    "And": {_BOOL: Op.LogicalAnd},
    "Or": {_BOOL: Op.LogicalOr},
    "BitwiseAnd": {_INT: Op.BitwiseAnd, _UINT: Op.BitwiseAnd, _BOOL: Op.LogicalAnd},
    "BitwiseOr": {_INT: Op.BitwiseOr, _UINT: Op.BitwiseOr, _BOOL: Op.LogicalOr},
    "BitwiseXor": {_INT: Op.BitwiseXor, _UINT: Op.BitwiseXor, _BOOL: Op.LogicalNotEqual},
    "LShift": {_INT: Op.ShiftLeftLogical, _UINT: Op.ShiftLeftLogical},
    "RShift": {_INT: Op.ShiftRightArithmetic, _UINT: Op.ShiftRightLogical},
}

COMPARISONS: dict[str, dict[Kind, Op]] = {
    "EQ": {_INT: Op.IEqual, _UINT: Op.IEqual, _FLOAT: Op.FOrdEqual, _BOOL: Op.LogicalEqual},
    "NE": {
        _INT: Op.INotEqual,
        _UINT: Op.INotEqual,
        _FLOAT: Op.FUnordNotEqual,
        _BOOL: Op.LogicalNotEqual,
    },
    "LT": {_INT: Op.SLessThan, _UINT: Op.ULessThan, _FLOAT: Op.FOrdLessThan},
    "LE": {_INT: Op.SLessThanEqual, _UINT: Op.ULessThanEqual, _FLOAT: Op.FOrdLessThanEqual},
    "GT": {_INT: Op.SGreaterThan, _UINT: Op.UGreaterThan, _FLOAT: Op.FOrdGreaterThan},
    "GE": {
        _INT: Op.SGreaterThanEqual,
        _UINT: Op.UGreaterThanEqual,
        _FLOAT: Op.FOrdGreaterThanEqual,
    },
}


class Value(NamedTuple):
    """A computed value.

    Attributes:
        dtype: its type, with any number of lanes.
        parts: one id for each of ``dtype.parts()``.
    """

    dtype: DType
    parts: tuple[int, ...]

    @property
    def id(self) -> int:
        """The only id of a value of at most four lanes."""
        (only,) = self.parts
        return only


class Arithmetic:
    """Operations on values."""

    def __init__(self, function: FunctionBuilder):
        self._function = function
        self._module = function.module
        self._error = function.module.error

    # ----------------------------------------------- lanes, constants, mapping

    def constant(self, value: int | float | bool, dtype: DType) -> Value:
        """Return a constant; vectors have it in every lane."""
        scalar = Value(dtype.scalar, (self._module.constant(value, dtype.scalar),))
        return self.broadcast(scalar, dtype.lanes)

    def broadcast(self, value: Value, lanes: int) -> Value:
        """Return a vector whose lanes are all the scalar ``value``."""
        return self.pack([value] * lanes)

    def lanes(self, value: Value) -> list[Value]:
        """Return the lanes of a value as scalars."""
        if value.dtype.lanes == 1:
            return [value]
        scalar = value.dtype.scalar
        self._module.use_arithmetic(scalar)
        return [
            Value(scalar, (self._function.emit(Op.CompositeExtract, scalar, part, lane),))
            if dtype.lanes > 1
            else Value(scalar, (part,))
            for part, dtype in zip(value.parts, value.dtype.parts(), strict=True)
            for lane in range(dtype.lanes)
        ]

    def pack(self, scalars: Sequence[Value]) -> Value:
        """Return a vector of the given scalars, or the scalar if there is one."""
        if len(scalars) == 1:
            return scalars[0]
        dtype = scalars[0].dtype.with_lanes(len(scalars))
        self._module.use_arithmetic(dtype)
        parts, start = [], 0
        for part in dtype.parts():
            ids = [scalar.id for scalar in scalars[start : start + part.lanes]]
            start += part.lanes
            parts.append(
                ids[0]
                if part.lanes == 1
                else self._function.emit(Op.CompositeConstruct, part, *ids)
            )
        return Value(dtype, tuple(parts))

    def map(self, op: Op, dtype: DType, *operands: Value, literals: Sequence[int] = ()) -> Value:
        """Apply an instruction to corresponding parts of the operands.

        Args:
            op: opcode.
            dtype: type of the result.
            operands: values with the same number of lanes.
            literals: words that come before the operands.
        """
        for used in (dtype, *(operand.dtype for operand in operands)):
            self._module.use_arithmetic(used)
        return self.convert(op, dtype, *operands, literals=literals)

    def convert(
        self, op: Op, dtype: DType, *operands: Value, literals: Sequence[int] = ()
    ) -> Value:
        """Do as `map` for instructions that storage-only types may use."""
        return Value(
            dtype,
            tuple(
                self._function.emit(op, part, *literals, *ids)
                for part, *ids in zip(
                    dtype.parts(), *(operand.parts for operand in operands), strict=True
                )
            ),
        )

    # -------------------------------------------------------------- operations

    def binary(self, name: str, a: Value, b: Value) -> Value:
        """Apply an operation of `ARITHMETIC` or `COMPARISONS`.

        Raises:
            UnsupportedError: there is none for the operands' type.
        """
        dtype = a.dtype
        if name == "Mod" and dtype.kind is Kind.INT:
            # Vulkan leaves SRem undefined for negative operands; SDiv truncates as TIR does.
            return self.binary("Sub", a, self.binary("Mul", self.binary("Div", a, b), b))
        compares = name in COMPARISONS
        op = (COMPARISONS if compares else ARITHMETIC)[name].get(dtype.kind)
        if op is None:
            raise self._error.unsupported(f"{name} of {dtype}")
        return self.map(op, BOOL.with_lanes(dtype.lanes) if compares else dtype, a, b)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """Return, lane by lane, ``a`` where ``condition`` holds, else ``b``."""
        lanes = a.dtype.lanes
        if lanes > 1 and condition.dtype.lanes == 1:
            condition = self.broadcast(condition, lanes)
        return self.map(Op.Select, a.dtype, condition, a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        """Return ``a < b ? a : b``, which fixes what happens to NaN."""
        return self.select(self.binary("LT", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """Return ``a > b ? a : b``, which fixes what happens to NaN."""
        return self.select(self.binary("GT", a, b), a, b)

    def invert(self, value: Value) -> Value:
        """Return the complement of bits, or of booleans."""
        return self.map(
            Op.LogicalNot if value.dtype.kind is Kind.BOOL else Op.Not, value.dtype, value
        )

    def glsl(self, instruction: Glsl | int, dtype: DType, *operands: Value) -> Value:
        """Apply an instruction of GLSL.std.450."""
        literals = (self._module.glsl_import, int(instruction))
        return self.map(Op.ExtInst, dtype, *operands, literals=literals)

    # ------------------------------------------------------------- conversions

    def cast(self, value: Value, to: DType) -> Value:
        """Convert a value as TIR's Cast does: truncating floats, wrapping integers."""
        source = value.dtype
        if source == to:
            return value
        if to.kind is Kind.BOOL:
            return self.binary("NE", value, self.constant(0, source))
        if source.kind is Kind.BOOL:
            return self.select(value, self.constant(1, to), self.constant(0, to))
        if source.kind is Kind.FLOAT or to.kind is Kind.FLOAT:
            return self._cast_float(value, to)
        return self._resize(value, to)

    def _cast_float(self, value: Value, to: DType) -> Value:
        source = value.dtype
        if source.kind is Kind.FLOAT and to.kind is Kind.FLOAT:
            return self.convert(Op.FConvert, to, value)
        # Between floats and narrow integers the way leads over 32-bit ones, which every device
        # converts; narrow ones may be storage-only.
        if source.kind is Kind.FLOAT and to.bits < 32:
            return self._resize(self.cast(value, to.with_bits(32)), to)
        if to.kind is Kind.FLOAT and source.bits < 32:
            return self.cast(self._resize(value, source.with_bits(32)), to)
        if source.kind is Kind.FLOAT:
            op = Op.ConvertFToS if to.kind is Kind.INT else Op.ConvertFToU
        else:
            op = Op.ConvertSToF if source.kind is Kind.INT else Op.ConvertUToF
        return self.map(op, to, value)

    def _resize(self, value: Value, to: DType) -> Value:
        source = value.dtype
        if source.bits == to.bits:
            return value if source == to else self.map(Op.Bitcast, to, value)
        if source.kind is Kind.INT:
            return self.convert(Op.SConvert, to, value)
        unsigned = to.with_kind(Kind.UINT)
        return self._resize(self.convert(Op.UConvert, unsigned, value), to)

    def reinterpret(self, value: Value, to: DType) -> Value:
        """Return the same bits as another type of equal total width."""
        source = value.dtype
        if source.bits * source.lanes != to.bits * to.lanes:
            raise self._error.unsupported(f"reinterpreting {source} as {to}")
        if source == to:
            return value
        if source.bits == to.bits:
            return self.map(Op.Bitcast, to, value)
        if source.bits > to.bits:
            narrow = to.with_lanes(source.bits // to.bits)
            pieces = [self._bitcast(lane, narrow) for lane in self.lanes(value)]
            return self.pack([lane for piece in pieces for lane in self.lanes(piece)])
        group = to.bits // source.bits
        scalars = self.lanes(value)
        wide = [
            self._bitcast(self.pack(scalars[i : i + group]), to.scalar)
            for i in range(0, len(scalars), group)
        ]
        return self.pack(wide)

    def _bitcast(self, value: Value, to: DType) -> Value:
        if max(value.dtype.lanes, to.lanes) > 4:
            raise self._error.unsupported(f"reinterpreting {value.dtype} as {to}")
        return self.map(Op.Bitcast, to, value)

    # ---------------------------------------------------------- counting bits

    def popcount(self, value: Value) -> Value:
        """Return the number of set bits, in the type of ``value``."""
        dtype = value.dtype
        count = UINT32.with_lanes(dtype.lanes)
        # Vulkan counts bits of 32-bit integers only.
        total = None
        for word in self._words(value):
            bits = self.map(Op.BitCount, count, word)
            total = bits if total is None else self.binary("Add", total, bits)
        assert total is not None
        return self.cast(total, dtype)

    def leading_zeros(self, value: Value) -> Value:
        """Return the number of zero bits above the highest set one; all of them for zero."""
        bits, result = value.dtype.bits, INT32.with_lanes(value.dtype.lanes)
        words = self._words(value)

        def highest(word: Value) -> Value:  # -1 for zero
            return self.glsl(Glsl.FindUMsb, result, word)

        msb = highest(words[0])
        if len(words) == 2:
            high = words[1]
            above = self.binary("Add", highest(high), self.constant(32, result))
            is_low = self.binary("EQ", high, self.constant(0, high.dtype))
            msb = self.select(is_low, msb, above)
        return self.binary("Sub", self.constant(bits - 1, result), msb)

    def _words(self, value: Value) -> list[Value]:
        """Return an integer as unsigned 32-bit words, low first, narrow ones zero-extended."""
        dtype = value.dtype
        unsigned = self._resize(value, dtype.with_kind(Kind.UINT))
        word = UINT32.with_lanes(dtype.lanes)
        if dtype.bits < 64:
            return [self._resize(unsigned, word)]
        high = self.binary("RShift", unsigned, self.constant(32, unsigned.dtype))
        return [self._resize(unsigned, word), self._resize(high, word)]
