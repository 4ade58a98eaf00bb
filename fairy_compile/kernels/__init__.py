"""Kernel families by name; a target lists the names it prefers, best first."""

from __future__ import annotations

from fairy_compile.kernels.base import PhaseKernel
from fairy_compile.kernels.generic import GenericKernel

KERNELS: dict[str, PhaseKernel] = {kernel.name: kernel for kernel in (GenericKernel(),)}

__all__ = ["KERNELS", "PhaseKernel"]
