"""Where the time of one decode step goes, kernel by kernel, as the virtual machine ran them."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fairy_compile.runtime.library import machine_without_graphs

if TYPE_CHECKING:
    from fairy_compile.runtime import Engine

STEPS = 5
_ATTENTION = "vm.builtin.attention_kv_cache_"
ATTENTION = "attention (KV cache)"
VIRTUAL_MACHINE = "virtual machine"


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one decode step.

    Attributes:
        name: PrimFunc or library symbol, within CUDA graphs, too; `ATTENTION` for the runtime's
            calls of the attention kernels; `VIRTUAL_MACHINE` for allocations, shapes and tuples.
        calls: in one step.
        seconds: in one step; median of `STEPS` steps. The shortest call of a step, a table
            look-up, is taken for the cost of instrumentation and subtracted from every call.
        share: of the seconds of all rows.
    """

    name: str
    calls: int
    seconds: float
    share: float

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)


class _Timer:
    """TVM's VM instrument: adds up calls and seconds per name, over one step."""

    def __init__(self, device: Any):
        self.calls: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._shortest = math.inf
        self._device = device
        self._open: list[float] = []
        self._inner: list[float] = []  # seconds of what open calls have called

    def __call__(self, _function: Any, symbol: str, before: bool, _result: Any, *_: Any) -> int:
        # The clock is read last before a call and first after it, so that our own time is out.
        if before:
            self._inner.append(0.0)
            self._open.append(time.perf_counter())
            return 0  # VMInstrumentReturnKind.NO_OP
        self._device.sync()
        whole = time.perf_counter() - self._open.pop()
        seconds = whole - self._inner.pop()
        if self._inner:
            self._inner[-1] += whole
        name = _row(symbol)
        self.calls[name] = self.calls.get(name, 0) + 1
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._shortest = min(self._shortest, seconds)
        return 0

    @property
    def seconds(self) -> dict[str, float]:
        """Name -> seconds of its calls, without the cost of measuring them."""
        return {name: s - self.calls[name] * self._shortest for name, s in self._seconds.items()}


def _row(symbol: str) -> str:
    if symbol.startswith(_ATTENTION):
        return ATTENTION
    return VIRTUAL_MACHINE if symbol.startswith("vm.") else symbol


def time_kernels(engine: Engine, sequence: int, token: int) -> tuple[KernelTime, ...]:
    """Decode ``token`` `STEPS` times under instrumentation; the sequence keeps its length.

    The code runs in a virtual machine of its own, so that the engine's stays uninstrumented.

    Returns:
        One row a kernel, the most expensive first.
    """
    import tvm

    library = tvm.runtime.load_module(str(engine.library.path))
    machine = machine_without_graphs(library, engine.device)
    steps = []
    for _ in range(STEPS + 1):
        timer = _Timer(engine.device)
        machine.set_instrument(timer)
        with engine.cache.forward([sequence], [1]):
            name, arguments = engine.steps.decode(np.asarray([token], np.int32))
            machine[name](*arguments)
        engine.popn(sequence, 1)
        steps.append(timer)
    return _median(steps[1:])  # the first one warms up


def _median(steps: list[_Timer]) -> tuple[KernelTime, ...]:
    spent = [step.seconds for step in steps]
    seconds = {name: statistics.median(step[name] for step in spent) for name in spent[0]}
    total = sum(seconds.values())
    rows = [KernelTime(n, steps[0].calls[n], s, s / total) for n, s in seconds.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))
