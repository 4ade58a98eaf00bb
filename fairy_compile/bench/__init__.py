"""Speed of compiled models, by the conventions of llama.cpp's ``llama-bench``.

`bench` measures one artifact; `compare` runs it in turns with llama.cpp on a random model of the
same shape. Both return dataclasses that print as tables and save as JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairy_compile.bench.result import BenchResult, Comparison
from fairy_compile.bench.workload import Settings, Workload

if TYPE_CHECKING:
    from fairy_compile.bench.compare import compare
    from fairy_compile.bench.run import bench

_LAZY = {"bench": "fairy_compile.bench.run", "compare": "fairy_compile.bench.compare"}

__all__ = ["BenchResult", "Comparison", "Settings", "Workload", "bench", "compare"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
