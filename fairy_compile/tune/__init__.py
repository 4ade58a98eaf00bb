"""Autotuning: choosing the knobs of kernels by measuring them, and keeping the choices as text.

A `tasks.Task` is a kernel call of a model with a batch class. `session` searches its knobs: it asks
a `search` strategy for candidates, has `builder` compile them in worker processes and devices
check and time them (`measure` on this machine, `rpc` elsewhere), and ends by writing `records`,
which `build` reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairy_compile.tune.api import TuneReport, tune
    from fairy_compile.tune.settings import Settings

__all__ = ["Settings", "TuneReport", "tune"]

_HOME = {"Settings": "settings", "TuneReport": "api", "tune": "api"}


def __getattr__(name: str) -> object:
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(f"fairy_compile.tune.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
