"""Run an artifact on a CUDA driver that does nothing; print what was asked of it, as JSON.

python -m tests.emulation.idle_steps ARTIFACT      # with idle_driver.c's libraries in the path
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import fairy_compile as fc
from fairy_compile.bench.kernels import time_kernels

FIELDS = ("launches", "graphs", "nodes", "instantiated", "copies", "syncs", "allocations")


class Counts(ctypes.Structure):
    """As idle_driver.c has them."""

    _fields_ = [(name, ctypes.c_long) for name in (*FIELDS, "violations")]


def main() -> None:
    """Count what prefills and steps ask for."""
    library = ctypes.CDLL("libcuda.so.1")
    counts = Counts.in_dll(library, "idle_counts")
    violation = (ctypes.c_char * 256).in_dll(library, "idle_violation")
    rows: list[dict[str, Any]] = []

    def counted(what: str, run: Any) -> Any:
        before = {name: getattr(counts, name) for name in FIELDS}
        result = run()
        rows.append({"what": what, **{n: getattr(counts, n) - before[n] for n in FIELDS}})
        return result

    with fc.load(sys.argv[1], kv_tokens=1024) as model:
        engine = model.engine
        one = engine.add_sequence()
        counted("prefill", lambda: engine.prefill(one, [1, 2, 3]))
        for _ in range(3):
            counted("decode", lambda: engine.decode([one], [5]))
        two = counted("fork", lambda: engine.fork(one))
        for _ in range(3):
            counted("batch", lambda: engine.decode([one, two], [5, 6]))
        engine.prefill(one, [7] * 300)
        for _ in range(2):
            counted("long", lambda: engine.decode([one], [5]))
        traced = counted("trace", lambda: model.trace_kernels([1, 2]))
        timed = counted("time", lambda: time_kernels(engine, one, 3))
    kernels = {row.name: row.calls for row in timed}
    found = {"rows": rows, "violations": counts.violations, "traced": traced, "timed": kernels}
    print(json.dumps({**found, "violation": violation.value.decode()}))


if __name__ == "__main__":
    main()
