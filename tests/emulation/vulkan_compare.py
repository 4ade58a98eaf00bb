"""Element-wise functions on lavapipe and on llvm, from one tensor expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, te, tirx

from tests.emulation.vulkan_target import HOST, run

THREADS = 16

Body = Callable[..., Any]
"""Takes one scalar expression for each input, returns one or several results."""


def define(body: Body, dtypes: Sequence[str], length: int) -> tuple[Any, list[str]]:
    """Return a PrimFunc that maps ``body`` over vectors, and the types of its results."""
    inputs = [te.placeholder((length,), dtype, name=f"in{i}") for i, dtype in enumerate(dtypes)]

    def results(i: Any) -> list[Any]:
        found = body(*(tensor[i].asobject() for tensor in inputs))
        return list(found) if isinstance(found, list | tuple) else [found]

    def result(k: int) -> Any:
        return te.compute((length,), lambda i: results(i)[k], name=f"out{k}")

    outputs = [result(k) for k in range(len(results(tirx.Var("i", "int32"))))]
    dtypes_out = [str(tensor.dtype) for tensor in outputs]
    return te.create_prim_func([*inputs, *outputs]), dtypes_out


def bind_threads(function: Any, lanes: int = 1) -> Any:
    """Spread the one loop over blocks and threads, each with a vector of ``lanes``."""
    schedule = s_tir.Schedule(function)
    # Several results may be computed by blocks of their own.
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        (loop,) = schedule.get_loops(block)
        grid, thread, vector = schedule.split(loop, [None, THREADS, lanes])
        schedule.bind(grid, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        if lanes > 1:
            schedule.vectorize(vector)
    return schedule.mod["main"]


def run_vulkan(
    body: Body, inputs: Sequence[np.ndarray], lanes: int = 1, **target: Any
) -> list[np.ndarray]:
    """Return every result of ``body`` over ``inputs`` on lavapipe."""
    function, results = define(body, [str(array.dtype) for array in inputs], len(inputs[0]))
    outputs = [np.zeros(len(inputs[0]), dtype) for dtype in results]
    return run(bind_threads(function, lanes), [*inputs, *outputs], **target)[len(inputs) :]


def run_both(
    body: Body, inputs: Sequence[np.ndarray], lanes: int = 1, **target: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (llvm, lavapipe) for every result of ``body`` over ``inputs``."""
    function, results = define(body, [str(array.dtype) for array in inputs], len(inputs[0]))
    expected = [tvm.runtime.tensor(np.zeros(len(inputs[0]), dtype)) for dtype in results]
    tvm.compile(function, target=HOST)(*map(tvm.runtime.tensor, inputs), *expected)
    seen = run_vulkan(body, inputs, lanes, **target)
    return [(e.numpy(), s) for e, s in zip(expected, seen, strict=True)]
