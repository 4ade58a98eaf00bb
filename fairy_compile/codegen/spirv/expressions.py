"""Expressions: one method for each class of TIR expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.sym import Analyzer

from fairy_compile.codegen.spirv import calls
from fairy_compile.codegen.spirv.dtypes import INT32, UINT32, dtype_of
from fairy_compile.codegen.spirv.enums import BuiltIn, Decoration, Op, StorageClass
from fairy_compile.codegen.spirv.function import FunctionBuilder
from fairy_compile.codegen.spirv.matrices import Matrices
from fairy_compile.codegen.spirv.memory import Buffer, Memory
from fairy_compile.codegen.spirv.values import ARITHMETIC, COMPARISONS, Arithmetic, Value


class Expressions:
    """Emits the instructions of expressions.

    Attributes:
        function, module: where instructions and declarations go.
        arithmetic, memory, matrices: what the instructions are made with.
        variables: values of TIR variables in scope.
        buffers: buffers in scope, by TIR buffer or by the parameter that points to it.
        analyzer: knows what bound variables stand for.
        error: makes errors that name the kernel.
    """

    def __init__(self, function: FunctionBuilder):
        self.function = function
        self.module = function.module
        self.error = function.module.error
        self.arithmetic = Arithmetic(function)
        self.memory = Memory(function, self.arithmetic)
        self.matrices = Matrices(self)
        self.variables: dict[Any, Value] = {}
        self.buffers: dict[Any, Buffer] = {}
        self.analyzer = Analyzer()
        self._built_ins: dict[BuiltIn, int] = {}
        self._visitors: dict[str, Callable[[Any], Value]] = {
            "Var": self._variable,
            "IntImm": self._immediate,
            "FloatImm": self._immediate,
            "Cast": self._cast,
            "Not": lambda node: self.arithmetic.invert(self.value(node.a)),
            "BitwiseNot": lambda node: self.arithmetic.invert(self.value(node.a)),
            "Min": lambda node: self.arithmetic.minimum(self.value(node.a), self.value(node.b)),
            "Max": lambda node: self.arithmetic.maximum(self.value(node.a), self.value(node.b)),
            "Select": self._select,
            "Let": self._let,
            "Ramp": lambda node: self.arithmetic.pack(self.lanes(node)),
            "Broadcast": self._broadcast,
            "Shuffle": self._shuffle,
            "TensorLoad": self._load,
            "Call": lambda node: calls.emit_call(self, node),
        }

    def value(self, node: Any) -> Value:
        """Emit an expression.

        Raises:
            UnsupportedError: it has no SPIR-V form on the target.
        """
        name = type(node).__name__
        try:
            if name == "Div" and _undoes(node):
                return self.value(node.a.a)
            if name in ARITHMETIC or name in COMPARISONS:
                return self.arithmetic.binary(name, self.value(node.a), self.value(node.b))
            visitor = self._visitors.get(name)
            if visitor is None:
                raise self.error.unsupported(f"expression {name}, {node},")
            return visitor(node)
        except ValueError as error:  # a data type that SPIR-V lacks
            raise self.error.unsupported(f"{node} ({error})") from error

    def lanes(self, node: Any) -> list[Value]:
        """Emit an integer expression and return its lanes; ramps need no vector for that."""
        if not isinstance(node, tirx.Ramp):
            return self.arithmetic.lanes(self.value(node))
        base, stride = self.value(node.base), self.value(node.stride)
        result = [base]
        for lane in range(1, dtype_of(node).lanes):
            step = self.arithmetic.constant(lane, stride.dtype)
            offset = self.arithmetic.binary("Mul", stride, step)
            result.append(self.arithmetic.binary("Add", base, offset))
        return result

    def buffer(self, key: Any) -> Buffer:
        """Return a buffer in scope.

        Raises:
            UnsupportedError: a pointer that is not a whole buffer.
        """
        found = self.buffers.get(key)
        if found is None:
            raise self.error.unsupported(f"access through pointer {key}")
        return found

    def built_in(self, which: BuiltIn) -> Value:
        """Return a variable that the device fills in: an index vector or an unsigned scalar."""
        has_axes = which in (BuiltIn.WorkgroupId, BuiltIn.LocalInvocationId)
        dtype = UINT32.with_lanes(3 if has_axes else 1)
        if which not in self._built_ins:
            pointer = self.module.variable(StorageClass.Input, self.module.type(dtype), which.name)
            self.module.decorate(pointer, Decoration.BuiltIn, which)
            self._built_ins[which] = pointer
        # Constant while the kernel runs, so equal loads are one.
        return Value(dtype, (self.function.emit(Op.Load, dtype, self._built_ins[which]),))

    # ---------------------------------------------------------------- visitors

    def _variable(self, node: Any) -> Value:
        if node not in self.variables:
            raise self.error.unsupported(f"variable {node.name} of type {node.ty}")
        return self.variables[node]

    def _immediate(self, node: Any) -> Value:
        return self.arithmetic.constant(node.value, dtype_of(node))

    def _cast(self, node: Any) -> Value:
        return self.arithmetic.cast(self.value(node.value), dtype_of(node))

    def _select(self, node: Any) -> Value:
        return self.arithmetic.select(
            self.value(node.condition), self.value(node.true_value), self.value(node.false_value)
        )

    def _let(self, node: Any) -> Value:
        self.variables[node.var] = self.value(node.value)
        return self.value(node.body)

    def _broadcast(self, node: Any) -> Value:
        return self.arithmetic.broadcast(self.value(node.value), dtype_of(node).lanes)

    def _shuffle(self, node: Any) -> Value:
        lanes = [lane for v in node.vectors for lane in self.arithmetic.lanes(self.value(v))]
        return self.arithmetic.pack([lanes[int(i)] for i in node.indices])

    def _load(self, node: Any) -> Value:
        if getattr(node, "predicate", None) is not None:
            raise self.error.unsupported(f"a predicated load, {node},")
        (index,) = node.indices
        buffer, dtype = self.buffer(node.source), dtype_of(node)
        width = self._vector_width(buffer, index)
        if width == 1:
            return self.memory.load(buffer, self.lanes(index), dtype)
        base = self.value(index.base)
        by = self.arithmetic.constant(width.bit_length() - 1, base.dtype)
        first = self.arithmetic.binary("RShift", base, by)  # exact, and never negative
        places = [
            self.arithmetic.binary("Add", first, self.arithmetic.constant(i, base.dtype))
            if i
            else first
            for i in range(dtype.lanes // width)
        ]
        return self.memory.load(self.memory.vector_view(buffer, width), places, dtype)

    def _vector_width(self, buffer: Buffer, index: Any) -> int:
        """Return the lanes that a load from a storage buffer can take at once: 4, 2 or 1."""
        plain = buffer.storage_class is StorageClass.StorageBuffer and buffer.element.lanes == 1
        if not plain or not isinstance(index, tirx.Ramp):
            return 1
        if not isinstance(index.stride, tirx.IntImm) or int(index.stride) != 1:
            return 1
        found = self.analyzer.modular_set(index.base)
        for width in (4, 2):
            if all(int(n) % width == 0 for n in (dtype_of(index).lanes, found.coeff, found.base)):
                return width
        return 1


def _undoes(node: Any) -> bool:
    """Tell whether a quotient is of a product with the same constant, as vectorised indices are.

    TIR's wide integers do not overflow, so it is the other factor.
    """
    product, divisor = node.a, node.b
    return (
        type(product).__name__ == "Mul"
        and isinstance(divisor, tirx.IntImm)
        and isinstance(product.b, tirx.IntImm)
        and int(divisor) == int(product.b) != 0
        and dtype_of(node) == INT32
    )
