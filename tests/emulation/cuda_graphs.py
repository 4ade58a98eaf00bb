"""TVM's CUDA graph builtins on a simulated device.

What was recorded at the first call runs again with the arguments of that call, whatever the later
ones are, and results lie where they lay first: as replayed launches do.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
import tvm_ffi


class Recorder:
    """Recorded runs of every virtual machine.

    Attributes:
        recorded: how often something was recorded.
        replayed: how often it ran again.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self._allocated: dict[tuple, Any] = {}
        self._runs: dict[tuple, tuple[list[Any], Any]] = {}
        self._invoke = tvm.get_global_func("vm.builtin.invoke_closure")

    def allocation(self, machine: Any, allocate: Any, index: int) -> Any:
        """Return what ``allocate`` gave this machine at the first call."""
        key = (_address(machine), index)
        if key not in self._allocated:
            self._allocated[key] = self._invoke(machine, allocate)
        return self._allocated[key]

    def run(self, machine: Any, body: Any, inputs: Any, index: int, sizes: Any = None) -> Any:
        """Record ``body``, or run what was recorded, and return its results.

        ``sizes`` are those of a symbolic number of rows; they are among the inputs, too.
        """
        key = (_address(machine), index, None if sizes is None else tuple(map(int, sizes)))
        if key not in self._runs:
            self.recorded += 1
            self._runs[key] = (list(inputs), self._invoke(machine, body, *inputs))
            return self._runs[key][1]
        self.replayed += 1
        arguments, results = self._runs[key]
        self._invoke(machine, body, *arguments)
        return results


def _address(machine: Any) -> int:
    return int(getattr(machine, "value", machine))


@cache
def install() -> Recorder:
    """Give this process the builtins, for good."""
    recorder = Recorder()
    prefix = "vm.builtin.cuda_graph."
    tvm_ffi.register_global_func(f"{prefix}get_cached_alloc", recorder.allocation, override=True)
    tvm_ffi.register_global_func(f"{prefix}run_or_capture", recorder.run, override=True)
    return recorder
