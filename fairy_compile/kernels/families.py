"""Kernel families by name; a target lists the families it prefers, best first."""

from __future__ import annotations

from fairy_compile.kernels.arm import CODEBOOK_KERNELS as ARM_CODEBOOK
from fairy_compile.kernels.base import PhaseKernel
from fairy_compile.kernels.cuda import CUDA_PLANES, CUDA_WORDS
from fairy_compile.kernels.cuda_hopper import CUDA_HOPPER
from fairy_compile.kernels.generic import GenericKernel
from fairy_compile.kernels.metal import METAL_KERNELS
from fairy_compile.kernels.opencl import OPENCL_KERNELS
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.kernels.webgpu import WEBGPU_KERNELS
from fairy_compile.kernels.x86 import CODEBOOK_KERNELS as X86_CODEBOOK

FAMILIES: dict[str, tuple[PhaseKernel, ...]] = {
    "x86.codebook": X86_CODEBOOK,
    "arm.codebook": ARM_CODEBOOK,
    "cuda.hopper": CUDA_HOPPER,
    "cuda.planes": CUDA_PLANES,
    "cuda.words": CUDA_WORDS,
    "metal.words": METAL_KERNELS,
    "opencl.words": OPENCL_KERNELS,
    "vulkan.words": VULKAN_KERNELS,
    "webgpu.words": WEBGPU_KERNELS,
    "generic": (GenericKernel(),),
}
"""Family name -> its kernels, best first."""
