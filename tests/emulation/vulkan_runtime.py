"""TVM's device ``tvm.vulkan()`` on top of `VulkanDevice`, so that whole modules run on lavapipe.

The host code that TVM generates calls kernels as it would with TVM's own Vulkan runtime: this rig
reads the module's bytes, and dispatches with the grid and the arguments the host passes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
import tvm_ffi.cpp

from tests.emulation.vulkan_device import DeviceBuffer, device
from tests.emulation.vulkan_module import POINTER, ShaderKernel, parse_module

_LIVE: dict[int, DeviceBuffer] = {}
_POISON = 0xFF  # NaN in every float format: reading what nothing wrote shows

launches: dict[str, int] = {}
"""How often each kernel ran, by name."""


@cache
def install() -> None:
    """Register the device and the loader of Vulkan modules with TVM, once in a process."""
    folder = Path(tvm.__file__).parent / "include"
    library = tvm_ffi.cpp.load_inline(
        "fairy_compile_vulkan_test_runtime",
        cpp_sources=Path(__file__).with_suffix(".cc").read_text("utf-8"),
        functions=["install", "make_module"],
        extra_include_paths=[str(folder)],
        extra_ldflags=["-L" + str(folder.parent / "lib"), "-ltvm_runtime"],
    )
    library["install"](tvm_ffi.convert(_allocate), tvm_ffi.convert(_release))

    @tvm_ffi.register_global_func("ffi.Module.load_from_bytes.vulkan")
    def load(data: bytes) -> Any:
        data = bytes(data)
        kernels = {name: _launcher(kernel) for name, kernel in parse_module(data).items()}
        return library["make_module"](data, kernels)


def _allocate(nbytes: int) -> int:
    buffer = device().allocate(nbytes)
    buffer.array()[:] = _POISON
    _LIVE[buffer.address] = buffer
    return buffer.address


def _release(address: int) -> None:
    device().free(_LIVE.pop(address))


def _launcher(kernel: ShaderKernel) -> Any:
    """Return a function that takes what TVM's host code passes: arguments, then launch sizes."""
    count = len(kernel.arguments)

    def launch(*args: Any) -> None:
        sizes = dict(zip(kernel.launch_tags, args[count:], strict=True))
        # TVM's runtimes launch one where a size is zero.
        grid = tuple(max(1, int(sizes.get(f"blockIdx.{axis}", 1))) for axis in "xyz")
        buffers, scalars = [], []
        for (code, _, _), argument in zip(kernel.arguments, args[:count], strict=True):
            if code == POINTER:
                buffers.append(_LIVE[ctypes.cast(argument, ctypes.c_void_p).value])
            else:
                scalars.append(argument)
        launches[kernel.name] = launches.get(kernel.name, 0) + 1
        device().dispatch(kernel, buffers, grid, scalars)

    return tvm_ffi.convert(launch)
