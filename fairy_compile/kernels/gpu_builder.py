"""What every GPU kernel is written with: launches, memories, reductions.

Kernels are TIR with explicit thread bindings, so that the same text serves every GPU code
generator. Barriers are not written: TVM's ThreadSync pass puts one wherever threads of a group read
shared memory that others wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

THREADS = 256
"""Threads of a group that works on one row; every GPU API guarantees as many."""


def build_function(name: str, body: Callable[[], None], **attributes: Any) -> PrimFunc:
    """Return the function whose arguments and launches ``body`` emits, marked as scheduled."""
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, **attributes})
        body()
    return ir.get()


@contextmanager
def launch(extents: Mapping[str, Any], arguments: Sequence[Buffer] = ()) -> Iterator[list[Any]]:
    """Open one kernel launch; yields the thread indices in the order of ``extents``.

    Args:
        extents: thread tag -> number, e.g. ``{"blockIdx.x": rows, "threadIdx.x": 256}``.
        arguments: all buffers of the function, the output last, where registers are indices into
            them. The launch then says that it reads and writes all of them. Else TVM says where,
            and names the registers doing so: outside of the launch, to where it then moves them,
            which is memory of the device that all thread groups share.
    """
    with ExitStack() as stack:
        stack.enter_context(T.sblock("launch"))
        if arguments:
            *inputs, output = (b[tuple(slice(0, size) for size in b.shape)] for b in arguments)
            T.reads(*inputs)
            T.writes(output)
        yield [
            stack.enter_context(T.thread_binding(0, extent, thread=tag))
            for tag, extent in extents.items()
        ]


def local(shape: Sequence[int], dtype: str = "float32") -> Buffer:
    """Allocate registers of one thread."""
    return T.sblock_alloc_buffer(tuple(shape), dtype, scope="local")


def shared(shape: Sequence[int], dtype: str = "float32") -> Buffer:
    """Allocate memory that the threads of a group share."""
    return T.sblock_alloc_buffer(tuple(shape), dtype, scope="shared")


def scratch(name: str, shape: Sequence[Any], dtype: str = "float32") -> Buffer:
    """Allocate memory of the device for what launches of a function leave to each other."""
    return IRBuilder.name(name, T.alloc_buffer(tuple(shape), dtype, scope="global"))


def store(buffer: Buffer, index: Any, value: Any) -> None:
    """Store to ``buffer[index]``; a tuple has one index for each dimension."""
    T.buffer_store(buffer, value, list(index) if isinstance(index, tuple) else [index])


def load_float(buffer: Buffer, *index: Any) -> Expr:
    """Return one element as float32."""
    value = buffer[index if len(index) > 1 else index[0]]
    return value if str(buffer.dtype) == "float32" else T.cast(value, "float32")


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Open a block that runs where ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def launch_if(condition: Any) -> Iterator[None]:
    """Open a part of the host's code whose launches happen where ``condition`` holds.

    A loop of one turn or none: ThreadSync takes every If around a barrier for one that threads
    disagree about.
    """
    with T.serial(0, T.if_then_else(condition, T.int32(1), T.int32(0))):
        yield


def ceildiv(a: Any, b: int) -> Any:
    """Return a / b, rounded up."""
    return -(-a // b) if isinstance(a, int) else (a + (b - 1)) // b


def reduce_group(
    values: Sequence[Any],
    combine: Callable[[Any, Any], Any],
    thread: Any,
    threads: int,
    dtype: str = "float32",
    team: Any = 0,
    teams: int = 1,
) -> list[Any]:
    """Combine one value a thread over ``threads``, a power of two; ``teams`` do so side by side.

    Returns:
        The combined values, the same in every thread.
    """
    # Memories apart: in one, TVM would see conflicts between different values.
    memories = [shared((teams * threads,), dtype) for _ in values]
    first = team * threads
    for memory, value in zip(memories, values, strict=True):
        store(memory, first + thread, value)
    step = threads // 2
    while step:
        with when(thread < step):
            for memory in memories:
                at = first + thread
                store(memory, at, combine(memory[at], memory[at + step]))
        step //= 2
    # Not bound to a name: TVM would put the load where the name is used, perhaps in a condition.
    results = local((len(values),), dtype)
    for i, memory in enumerate(memories):
        store(results, i, memory[first])
    return [results[i] for i in range(len(values))]


def strided(count: Any, thread: Any, threads: int, body: Callable[[Any], None]) -> None:
    """Run body(i) for i = thread, thread + threads, ... below ``count``."""
    with T.serial(0, ceildiv(count, threads)) as step:
        index = T.bind(step * threads + thread)
        if isinstance(count, int) and count % threads == 0:
            body(index)
        else:
            with when(index < count):
                body(index)
