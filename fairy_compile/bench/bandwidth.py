"""How fast this machine's CPU reads memory: the floor under the time of a decode step.

Decoding one token reads every weight once. No kernel can be faster than reading them, so kernels
are judged by the share of this bandwidth they reach, measured in the same run with the same
threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fairy_compile.targets import Target

DEFAULT_BYTES = 1 << 30
"""Larger than any last-level cache, also the shared ones that virtual machines see."""

_CHUNKS = 256
_LANES, _WAYS = 8, 4  # 64-byte loads, four sums so that additions do not wait for each other


def compile_read(target: Target) -> Callable[[Any, Any], None]:
    """Compile a read of uint64 (chunks, words) into sums (chunks, 32), spread over all threads.

    The sums keep the compiler from dropping the loads. ``words`` is a multiple of 32.
    """
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("plain_read")
        T.func_attr({"tirx.noalias": True})
        chunks, words = T.int64(), T.int64()
        data = T.arg("data", T.buffer((chunks, words), "uint64"))
        out = T.arg("out", T.buffer((chunks, _WAYS * _LANES), "uint64"))
        with T.parallel(0, chunks) as c:
            sums = [T.alloc_buffer((_LANES,), "uint64") for _ in range(_WAYS)]
            at = T.ramp(0, 1, _LANES)
            for s in sums:
                T.buffer_store(s, T.broadcast(T.uint64(0), _LANES), [at])
            with T.serial(0, words // (_WAYS * _LANES)) as i:
                for k, s in enumerate(sums):
                    value = data[c, T.ramp((i * _WAYS + k) * _LANES, 1, _LANES)]
                    T.buffer_store(s, s[at] + value, [at])
            for k, s in enumerate(sums):
                T.buffer_store(out, s[at], [c, T.ramp(k * _LANES, 1, _LANES)])
    return tvm.compile(ir.get(), target=target.to_tvm())["plain_read"]


def default_bytes(memory_bytes: int) -> int:
    """Return how much to read on a machine with so much memory (0: unknown)."""
    return min(DEFAULT_BYTES, memory_bytes // 8) if memory_bytes else DEFAULT_BYTES


class ReadBandwidth:
    """A buffer larger than the caches and a kernel that reads it with TVM's thread pool.

    Set the number of threads (`runtime.threads.set_threads`) before the first measurement.

    Attributes:
        nbytes: bytes read by one measurement.
    """

    def __init__(self, nbytes: int = DEFAULT_BYTES):
        """Allocate at least ``nbytes``, in huge pages where the system gives them.

        With small pages part of the time is address translation, which weights in huge pages
        would not pay: the floor has to be the faster of the two.
        """
        import tvm

        from fairy_compile.runtime.host_memory import allocate
        from fairy_compile.targets import load_target

        row = _LANES * _WAYS * 8
        words = -(-nbytes // (_CHUNKS * row)) * row // 8
        self.nbytes = _CHUNKS * words * 8
        self._data = allocate(self.nbytes).view(np.uint64).reshape(_CHUNKS, words)
        self._data[...] = 1
        self._sums = tvm.runtime.tensor(np.zeros((_CHUNKS, _LANES * _WAYS), np.uint64))
        self._read = compile_read(load_target("cpu"))
        self._shared = tvm.runtime.from_dlpack(self._data)  # the same memory, not a copy
        self.measure()  # starts the threads

    def measure(self) -> float:
        """Read the buffer once and return bytes per second."""
        start = time.perf_counter()
        self._read(self._shared, self._sums)
        seconds = time.perf_counter() - start
        if int(self._sums.numpy().sum()) != self._data.size:
            raise RuntimeError("the read kernel did not read its whole buffer")
        return self.nbytes / seconds
