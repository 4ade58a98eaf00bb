"""Statements: one method for each class of TIR statement."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Call

from fairy_compile.codegen.spirv import calls, matrices
from fairy_compile.codegen.spirv.dtypes import INT32, UINT32, dtype_of, is_pointer, parse_dtype
from fairy_compile.codegen.spirv.enums import BuiltIn, LoopControl, Op
from fairy_compile.codegen.spirv.expressions import Expressions
from fairy_compile.codegen.spirv.values import COMPARISONS, Value

_THREAD_INDICES = {"threadIdx": BuiltIn.LocalInvocationId, "blockIdx": BuiltIn.WorkgroupId}
_AXES = "xyz"

_LOOP_CONTROL = {
    tirx.ForKind.SERIAL: LoopControl.NoHint,
    tirx.ForKind.UNROLLED: LoopControl.Unroll,
}


class Statements:
    """Emits the instructions of statements.

    Attributes:
        local_size: threads of a block along x, y, z, from the extents of ``threadIdx``.
    """

    def __init__(self, expressions: Expressions):
        self.local_size = [1, 1, 1]
        self._expressions = expressions
        self._function = expressions.function
        self._error = expressions.error
        self._visitors: dict[str, Callable[[Any], None]] = {
            "SeqStmt": self._sequence,
            "Bind": self._bind,
            "Evaluate": self._evaluate,
            "BufferStore": self._store,
            "AllocBuffer": self._allocate,
            "DeclBuffer": self._declare,
            "AttrStmt": self._attribute,
            "For": self._for,
            "While": self._while,
            "IfThenElse": self._if,
            "AssertStmt": lambda node: None,  # kernels cannot stop; the host checks what it can
            "Break": lambda node: self._function.leave(self._function.loops[-1].merge_label),
            "Continue": lambda node: self._function.leave(self._function.loops[-1].continue_label),
        }

    def run(self, node: Any) -> None:
        """Emit a statement.

        Raises:
            UnsupportedError: it has no SPIR-V form on the target.
        """
        visitor = self._visitors.get(type(node).__name__)
        if visitor is None:
            raise self._error.unsupported(f"statement {type(node).__name__}")
        try:
            visitor(node)
        except ValueError as error:  # a data type that SPIR-V lacks
            raise self._error.unsupported(f"{type(node).__name__} ({error})") from error

    def _sequence(self, node: Any) -> None:
        for statement in node.seq:
            self.run(statement)

    def _bind(self, node: Any) -> None:
        self._expressions.variables[node.var] = self._expressions.value(node.value)
        if not is_pointer(node.var) and dtype_of(node.var) == INT32:
            self._expressions.analyzer.bind(node.var, node.value)

    def _evaluate(self, node: Any) -> None:
        if isinstance(node.value, Call):
            calls.emit_effect(self._expressions, node.value)

    def _store(self, node: Any) -> None:
        if getattr(node, "predicate", None) is not None:
            raise self._error.unsupported(f"a predicated store, {node},")
        (index,) = node.indices
        value = self._expressions.value(node.value)
        buffer = self._expressions.buffer(node.buffer)
        self._expressions.memory.store(buffer, self._expressions.lanes(index), value)

    # ----------------------------------------------------------------- buffers

    def _allocate(self, node: Any) -> None:
        buffer, scope = node.buffer, str(node.buffer.scope())
        if scope == matrices.SCOPE:
            self._expressions.matrices.declare(buffer)
            return
        element = parse_dtype(str(buffer.dtype))
        (extent,) = buffer.shape
        if not isinstance(extent, tirx.IntImm):
            raise self._error.unsupported(f"array {buffer.name} of variable size {extent}")
        memory, length = self._expressions.memory, int(extent)
        if scope == "shared":
            volatile = bool(node.annotations.get("volatile_scope", False))
            made = memory.shared_array(buffer.name, element, length, volatile)
        elif scope == "local":
            made = memory.private_array(buffer.name, element, length)
        else:
            raise self._error.unsupported(f"array {buffer.name} in memory scope {scope!r}")
        self._expressions.buffers[buffer] = made

    def _declare(self, node: Any) -> None:
        """Give a buffer another name; TVM declares parameters' buffers this way."""
        source = node.data
        while isinstance(source, Call) and source.op.name.endswith("buffer_data"):
            source = source.args[0]
        self._expressions.buffers[node.buffer] = self._expressions.buffer(source)

    # ------------------------------------------------------------ control flow

    def _attribute(self, node: Any) -> None:
        if node.attr_key == "thread_extent":
            self._bind_thread(node.node, node.value)
        self.run(node.body)

    def _bind_thread(self, thread: Any, extent: Any) -> None:
        """Bind a thread or block index, and note the size of the block."""
        kind, _, axis = str(thread.thread_tag).partition(".")
        if kind not in _THREAD_INDICES or axis not in _AXES:
            raise self._error.unsupported(f"thread index {thread.thread_tag}")
        position = _AXES.index(axis)
        if kind == "threadIdx":
            if not isinstance(extent, tirx.IntImm):
                raise self._error.unsupported(f"a block of variable size {extent}")
            self.local_size[position] = int(extent)
        if thread.var in self._expressions.variables:
            return
        built_in = self._expressions.built_in(_THREAD_INDICES[kind])
        index = self._function.emit(Op.CompositeExtract, UINT32, built_in.id, position)
        self._expressions.variables[thread.var] = self._expressions.arithmetic.cast(
            Value(UINT32, (index,)), dtype_of(thread.var)
        )

    def _for(self, node: Any) -> None:
        control = _LOOP_CONTROL.get(tirx.ForKind(int(node.kind)))
        if control is None:
            raise self._error.unsupported(f"a loop of kind {tirx.ForKind(int(node.kind)).name}")
        dtype = dtype_of(node.loop_var)
        arithmetic = self._expressions.arithmetic
        start = arithmetic.cast(self._expressions.value(node.min), dtype)
        stop = arithmetic.cast(self._expressions.value(node.extent), dtype)
        if not (isinstance(node.min, tirx.IntImm) and int(node.min) == 0):
            stop = arithmetic.binary("Add", start, stop)
        if node.step is None:
            step = arithmetic.constant(1, dtype)
        else:
            step = arithmetic.cast(self._expressions.value(node.step), dtype)

        def body(counter: int) -> None:
            self._expressions.variables[node.loop_var] = Value(dtype, (counter,))
            self.run(node.body)

        bounds = (start.id, stop.id, step.id)
        less_than = COMPARISONS["LT"][dtype.kind]
        self._function.counted_loop(dtype, bounds, less_than, body, control)

    def _while(self, node: Any) -> None:
        self._function.while_loop(
            lambda: self._expressions.value(node.condition).id, lambda: self.run(node.body)
        )

    def _if(self, node: Any) -> None:
        def branch(statement: Any) -> Callable[[], tuple[()]]:
            def emit() -> tuple[()]:
                self.run(statement)
                return ()

            return emit

        otherwise = node.else_case
        self._function.select_branch(
            self._expressions.value(node.condition).id,
            branch(node.then_case),
            None if otherwise is None else branch(otherwise),
        )
