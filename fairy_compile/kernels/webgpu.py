"""WebGPU: the shared GPU kernels as they are, sums through workgroup memory.

Subgroups are an optional feature, and their size is the adapter's to choose; workgroup memory
always works. Codes are 32-bit words already, the only integers WGSL has.
"""

from __future__ import annotations

from fairy_compile.kernels.gpu import GpuKernel

WEBGPU_KERNELS = (GpuKernel("webgpu"),)
"""The family, best first."""
