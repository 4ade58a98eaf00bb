"""The simulated devices by the name of their target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.emulation import (
    cuda_library,
    cuda_rig,
    metal_rig,
    opencl_rig,
    spirv_val,
    vulkan_device,
    webgpu_rig,
)


def _metal(directory: Path) -> metal_rig.MetalRig:
    rig = metal_rig.MetalRig(directory)
    rig.order = 7  # no order of threads that one would expect
    return rig


def _vulkan(_: Path) -> Any:
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()
    return SimpleNamespace()


RIGS: dict[str, tuple[Callable[[], str | None], Callable[[Path], Any]]] = {
    "metal": (metal_rig.missing_tools, _metal),
    "cuda": (
        lambda: cuda_rig.missing_tools() or metal_rig.missing_tools(),
        cuda_library.CudaRig,
    ),
    "opencl": (opencl_rig.missing_tools, opencl_rig.OpenCLRig),
    "vulkan": (lambda: vulkan_device.missing_driver() or spirv_val.missing_validator(), _vulkan),
    "webgpu": (webgpu_rig.missing_tools, webgpu_rig.WebGpuRig),
}
"""Kind of device -> what tells which tools are missing, and what makes it in a folder."""
