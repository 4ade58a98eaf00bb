"""This machine's CPU as a device to measure on."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.targets import Target
from fairy_compile.tune.builder import SYMBOL
from fairy_compile.tune.problem import Problem
from fairy_compile.tune.tasks import Task


class LocalCpu:
    """This machine's CPU, with TVM's thread pool and weights on huge pages, as a loaded model has.

    Args:
        target: compiled for.
        threads: None for one a core.
    """

    fastest_bytes = 1e13

    def __init__(self, target: Target, threads: int | None) -> None:
        from fairy_compile.bench.machine import Machine
        from fairy_compile.runtime.amx import request_amx
        from fairy_compile.runtime.threads import set_threads

        if target.has("amx-int8"):
            request_amx()
        used = set_threads(threads)
        self.name = f"{Machine.here().cpu}, {used} thread{'s' * (used > 1)}"

    def connect(self, banned: frozenset[str]) -> bool:
        """See `Device.connect`."""
        return False

    def prepare(self, task: Task, problem: Problem, stream_bytes: int) -> None:
        """See `Device.prepare`."""
        import tvm

        from fairy_compile.runtime.host_memory import allocate_parts

        size = sum(a.nbytes for a in problem.arrays)
        copies = max(1, min(256, stream_bytes // max(1, size)))
        blocks = iter(allocate_parts([a.nbytes for _ in range(copies) for a in problem.arrays]))
        self._weights = []
        for _ in range(copies):
            placed = []
            for array in problem.arrays:
                there = next(blocks).view(array.dtype).reshape(array.shape)
                there[...] = array
                placed.append(tvm.runtime.from_dlpack(there))
            self._weights.append(tuple(placed))
        self._x = {b: tvm.runtime.tensor(x) for b, x in problem.x.items()}
        out, dtype = task.spec.out_features, task.spec.out_dtype
        self._poison = {b: np.full((b, out), np.nan, dtype) for b in task.rows}
        self._y = {b: tvm.runtime.tensor(poison) for b, poison in self._poison.items()}
        self._next = 0

    def load(self, library: Path) -> Any:
        """See `Device.load`."""
        import tvm

        return tvm.runtime.load_module(str(library))[SYMBOL]

    def output(self, function: Any, rows: int) -> np.ndarray:
        """See `Device.output`."""
        y = self._y[rows]
        y.copyfrom(self._poison[rows])
        function(self._x[rows], *self._weights[0], y)
        return y.numpy()

    def seconds(self, function: Any, rows: int, calls: int) -> float:
        """See `Device.seconds`."""
        x, y, weights, first = self._x[rows], self._y[rows], self._weights, self._next
        self._next = (first + calls) % len(weights)
        turns = [weights[(first + i) % len(weights)] for i in range(calls)]
        start = time.perf_counter()
        for arrays in turns:
            function(x, *arrays, y)
        return (time.perf_counter() - start) / calls

    def read_bytes_per_second(self) -> float:
        """See `Device.read_bytes_per_second`."""
        from fairy_compile.bench.bandwidth import ReadBandwidth, default_bytes
        from fairy_compile.bench.machine import memory_bytes

        plain = ReadBandwidth(default_bytes(memory_bytes()))
        return statistics.median(plain.measure() for _ in range(5))
