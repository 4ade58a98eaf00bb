"""OpenCL: the shared GPU kernels as they are, sums through local memory.

Sub-groups are an extension that few phones' drivers have; local memory always works.
"""

from __future__ import annotations

from fairy_compile.kernels.gpu import GpuKernel

OPENCL_KERNELS = (GpuKernel("opencl"),)
"""The family, best first."""
