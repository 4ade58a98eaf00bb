"""The body of the one function of a module: blocks, structured control flow, reuse of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from fairy_compile.codegen.spirv.dtypes import BOOL, DType
from fairy_compile.codegen.spirv.enums import (
    LoopControl,
    Op,
    SelectionControl,
    StorageClass,
)
from fairy_compile.codegen.spirv.module import ModuleBuilder, Words, append_instruction


class Loop(NamedTuple):
    """Where ``continue`` and ``break`` of a loop go."""

    continue_label: int
    merge_label: int


class FunctionBuilder:
    """Appends instructions to the current block.

    Pure instructions are numbered: an instruction equal to one that dominates it is not repeated.
    Dominance follows the nesting of control flow, which TIR shares with SPIR-V.

    Attributes:
        module: where types and constants go.
        variables: declarations of the function's variables.
        body: instructions after them.
        loops: enclosing loops, innermost last.
    """

    def __init__(self, module: ModuleBuilder):
        self.module = module
        self.variables: Words = []
        self.body: Words = []
        self.loops: list[Loop] = []
        self._numbered: list[dict[tuple, int]] = [{}]
        self._label: int | None = None

    def emit(self, op: Op, dtype: DType, *operands: int) -> int:
        """Append a pure instruction with a result of ``dtype``, or return an equal one's result."""
        return self.emit_typed(op, self.module.type(dtype), *operands)

    def emit_typed(self, op: Op, result_type: int, *operands: int) -> int:
        """Do as `emit` with the id of a type."""
        key = (op, result_type, operands)
        for scope in self._numbered:
            if key in scope:
                return scope[key]
        result = self.emit_impure(op, result_type, *operands)
        self._numbered[-1][key] = result
        return result

    def emit_impure(self, op: Op, result_type: int, *operands: int) -> int:
        """Append an instruction whose result depends on more than its operands."""
        result = self.module.new_id()
        append_instruction(self.body, op, result_type, result, *operands)
        return result

    def emit_void(self, op: Op, *operands: int) -> None:
        """Append an instruction without a result."""
        append_instruction(self.body, op, *operands)

    def variable(self, pointee: int, name: str) -> int:
        """Declare a variable of the invocation and return its pointer."""
        pointer = self.module.new_id()
        storage = StorageClass.Function
        pointer_type = self.module.pointer_type(storage, pointee)
        append_instruction(self.variables, Op.Variable, pointer_type, pointer, storage)
        self.module.name(pointer, name)
        return pointer

    # ------------------------------------------------------------------ blocks

    def begin_block(self, label: int) -> None:
        """Start the block ``label``; the previous one must have ended."""
        append_instruction(self.body, Op.Label, label)
        self._label = label

    def branch(self, label: int) -> None:
        """End the block with a jump."""
        self.emit_void(Op.Branch, label)

    def leave(self, label: int | None) -> None:
        """End the block early, by a jump out of it or, with None, by returning.

        What follows in the source is unreachable; it goes to a block of its own.
        """
        if label is None:
            self.emit_void(Op.Return)
        else:
            self.branch(label)
        self.begin_block(self.module.new_id())

    @contextmanager
    def _region(self) -> Iterator[None]:
        """Forget instructions numbered inside: they do not dominate what follows."""
        self._numbered.append({})
        try:
            yield
        finally:
            self._numbered.pop()

    def current_label(self) -> int:
        """Return the label of the current block, splitting off the entry block if need be."""
        if self._label is None:
            first = self.module.new_id()
            self.branch(first)
            self.begin_block(first)
        assert self._label is not None
        return self._label

    # ------------------------------------------------------------ control flow

    def select_branch(
        self,
        condition: int,
        then: Callable[[], Sequence[int]],
        otherwise: Callable[[], Sequence[int]] | None,
        results: Sequence[DType] = (),
    ) -> list[int]:
        """Run one of two branches and return the values of the one that ran.

        Args:
            condition: a boolean.
            then, otherwise: emit a branch and return as many ids as ``results`` has types.
            results: types of the values that the branches return.
        """
        new_id = self.module.new_id
        then_label, merge_label = new_id(), new_id()
        else_label = new_id() if otherwise else merge_label
        self.emit_void(Op.SelectionMerge, merge_label, SelectionControl.NoHint)
        self.emit_void(Op.BranchConditional, condition, then_label, else_label)
        incoming: list[tuple[Sequence[int], int]] = []
        for label, branch in ((then_label, then), (else_label, otherwise)):
            if branch is None:
                continue
            self.begin_block(label)
            with self._region():
                values = branch()
            incoming.append((values, self.current_label()))
            self.branch(merge_label)
        self.begin_block(merge_label)
        merged = []
        for i, dtype in enumerate(results):
            self.module.use_arithmetic(dtype)  # OpPhi is more than loading and storing
            pairs = [word for values, label in incoming for word in (values[i], label)]
            merged.append(self.emit_impure(Op.Phi, self.module.type(dtype), *pairs))
        return merged

    def counted_loop(
        self,
        dtype: DType,
        bounds: tuple[int, int, int],
        less_than: Op,
        body: Callable[[int], None],
        control: LoopControl,
    ) -> None:
        """Run ``body(counter)`` for counters from start up to stop.

        Args:
            dtype: type of the counter.
            bounds: ids of start, stop (exclusive) and step.
            less_than: comparison of two counters.
            body: emits the body.
            control: hint.
        """
        start, stop, step = bounds
        new_id, counter_type = self.module.new_id, self.module.type(dtype)
        before = self.current_label()
        head, inside, after, merge = new_id(), new_id(), new_id(), new_id()
        counter, following = new_id(), new_id()
        self.branch(head)
        self.begin_block(head)
        append_instruction(
            self.body, Op.Phi, counter_type, counter, start, before, following, after
        )
        more = self.emit_impure(less_than, self.module.type(BOOL), counter, stop)
        self.emit_void(Op.LoopMerge, merge, after, control)
        self.emit_void(Op.BranchConditional, more, inside, merge)
        self.begin_block(inside)
        with self._loop(Loop(after, merge)):
            body(counter)
        self.branch(after)
        self.begin_block(after)
        append_instruction(self.body, Op.IAdd, counter_type, following, counter, step)
        self.branch(head)
        self.begin_block(merge)

    def while_loop(self, condition: Callable[[], int], body: Callable[[], None]) -> None:
        """Run ``body`` while ``condition()`` yields true."""
        head, test, inside, after, merge = (self.module.new_id() for _ in range(5))
        self.branch(head)
        self.begin_block(head)
        self.emit_void(Op.LoopMerge, merge, after, LoopControl.NoHint)
        self.branch(test)
        # The condition has blocks of its own if it holds a lazy choice, so it cannot be in `head`.
        self.begin_block(test)
        with self._region():
            more = condition()
        self.emit_void(Op.BranchConditional, more, inside, merge)
        self.begin_block(inside)
        with self._loop(Loop(after, merge)):
            body()
        self.branch(after)
        self.begin_block(after)
        self.branch(head)
        self.begin_block(merge)

    @contextmanager
    def _loop(self, loop: Loop) -> Iterator[None]:
        self.loops.append(loop)
        with self._region():
            yield
        self.loops.pop()
