"""Kernel families by name; a target lists the families it prefers, best first.

`FAMILIES` is loaded when it is asked for: kernels need TVM's compiler, layouts and references of
packed weights do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairy_compile.kernels.base import PhaseKernel

if TYPE_CHECKING:
    from fairy_compile.kernels.families import FAMILIES


def __getattr__(name: str) -> Any:
    if name == "FAMILIES":
        from fairy_compile.kernels.families import FAMILIES

        return FAMILIES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["FAMILIES", "PhaseKernel"]
