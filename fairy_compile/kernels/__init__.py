"""Kernel families by name; a target lists the families it prefers, best first."""

from __future__ import annotations

from fairy_compile.kernels.base import PhaseKernel
from fairy_compile.kernels.generic import GenericKernel
from fairy_compile.kernels.x86 import CODEBOOK_KERNELS

FAMILIES: dict[str, tuple[PhaseKernel, ...]] = {
    "x86.codebook": CODEBOOK_KERNELS,
    "generic": (GenericKernel(),),
}
"""Family name -> its kernels, best first."""

__all__ = ["FAMILIES", "PhaseKernel"]
