"""A WebGPU device for TVM outside of browsers: wgpu-native on Mesa's lavapipe.

It has 16-bit floats, which Chromium's software adapter lacks. Device memory is host memory that is
copied to buffers of its very size for each launch, and back; shaders are checked by naga, another
compiler of WGSL than Chromium's.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from tests.emulation.gpu_modules import (
    CXX,
    Kernel,
    calling_python,
    install_device,
    on_load,
    read_module,
)

LAVAPIPE = Path("/usr/share/vulkan/icd.d/lvp_icd.x86_64.json")
_LAUNCH = "fairy_compile_tests.webgpu_launch"
_WRITES = "paramWriteAccess:"
# What TVM's JavaScript runtime asks for.
_LIMITS = {
    "max-storage-buffers-per-shader-stage": 10,
    "max-compute-workgroup-storage-size": 32768,
    "max-compute-invocations-per-workgroup": 256,
}
_MOST_GROUPS = 65535


def missing_tools() -> str | None:
    """Return what to install to run these tests, or None."""
    if not LAVAPIPE.exists():
        return "needs the Debian packages mesa-vulkan-drivers and libvulkan1"
    if not shutil.which(CXX):
        return "needs the Debian package clang-22"
    try:
        import wgpu  # noqa: F401
    except ImportError:
        return "needs the package wgpu"
    return None


class WebGpuRig:
    """The device of a test session.

    Attributes:
        launches: name of every kernel that ran.
        sources: WGSL of every kernel of the libraries loaded, by name.
    """

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("VK_ICD_FILENAMES", str(LAVAPIPE))
        # PyTorch may load Triton later, which crashes once lavapipe's LLVM is in the process.
        with suppress(ImportError):
            import triton  # noqa: F401
        import wgpu

        self.directory = directory
        adapters = wgpu.gpu.enumerate_adapters_sync()
        adapter = next(a for a in adapters if "shader-f16" in a.features)
        self.device = adapter.request_device_sync(
            required_features=["shader-f16"], required_limits=_LIMITS
        )
        self.kernels: list[tuple[Kernel, Any]] = []
        self.launches: list[str] = []
        self.sources: dict[str, str] = {}
        install_device("webgpu", directory)
        self._bytes = tvm.get_global_func("device_api.webgpu.bytes")
        on_load("webgpu", self.load)
        tvm_ffi.register_global_func(_LAUNCH, self.launch, override=True)

    def load(self, data: bytes) -> Any:
        """Compile a device module and return what runs it."""
        first = len(self.kernels)
        found = read_module(data, named=False)
        for kernel in found:
            self.sources[kernel.name] = kernel.source
            self.kernels.append((kernel, self._pipeline(kernel)))
        return calling_python(found, first, _LAUNCH, self.directory)

    def _pipeline(self, kernel: Kernel) -> tuple[Any, Any]:
        kinds = ["storage" if written else "read-only-storage" for written in _written(kernel)]
        entries = [_entry(binding, kind) for binding, kind in enumerate([*kinds, "uniform"])]
        layout = self.device.create_bind_group_layout(entries=entries)
        pipeline = self.device.create_compute_pipeline(
            layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
            compute={
                "module": self.device.create_shader_module(code=kernel.source),
                "entry_point": kernel.name,
            },
        )
        return pipeline, layout

    def launch(self, number: int, *args: Any) -> None:
        """Run one kernel and wait for it."""
        from wgpu import BufferUsage

        kernel, (pipeline, layout) = self.kernels[number]
        given = len(kernel.arguments)
        groups = [1, 1, 1]
        tags = [tag for tag in kernel.launch if not tag.startswith(_WRITES)]
        for tag, extent in zip(tags, args[given:], strict=True):
            if tag.startswith("block"):
                groups["xyz".index(tag[-1])] = int(extent)
        assert groups[2] == 1, "the browser's runtime keeps the third dimension to itself"
        assert max(groups) <= _MOST_GROUPS
        memories, numbers = [], []
        for i, value in enumerate(args[:given]):
            if kernel.is_buffer(i):
                memories.append(self._memory(value))
            else:
                kind = np.float32 if kernel.is_float(i) else np.int32
                numbers.append(np.array([value]).astype(kind).view(np.uint32)[0])
        numbers.append(np.uint32(groups[0]))
        usage = BufferUsage.STORAGE | BufferUsage.COPY_SRC
        buffers = [
            self.device.create_buffer_with_data(data=_padded(memory), usage=usage)
            for memory in memories
        ]
        uniform = np.array(numbers, np.uint32)
        buffers.append(
            self.device.create_buffer_with_data(data=uniform.tobytes(), usage=BufferUsage.UNIFORM)
        )
        group = self.device.create_bind_group(
            layout=layout,
            entries=[
                {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
                for i, buffer in enumerate(buffers)
            ],
        )
        encoder = self.device.create_command_encoder()
        work = encoder.begin_compute_pass()
        work.set_pipeline(pipeline)
        work.set_bind_group(0, group)
        work.dispatch_workgroups(*groups)
        work.end()
        self.device.queue.submit([encoder.finish()])
        for memory, buffer, written in zip(memories, buffers, _written(kernel), strict=False):
            if written:
                result = np.frombuffer(self.device.queue.read_buffer(buffer), np.uint8)
                memory[:] = result[: memory.size]
        self.launches.append(kernel.name)

    def _memory(self, pointer: Any) -> np.ndarray:
        """Return the host memory behind a device pointer, which must be an allocation's start."""
        size = self._bytes(pointer)
        assert size > 0, "kernels get whole allocations, as in a browser"
        address = int(getattr(pointer, "value", pointer))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _written(kernel: Kernel) -> list[int]:
    (tag,) = (tag for tag in kernel.launch if tag.startswith(_WRITES))
    return json.loads(tag.removeprefix(_WRITES))


def _entry(binding: int, kind: str) -> dict[str, Any]:
    from wgpu import ShaderStage

    return {"binding": binding, "visibility": ShaderStage.COMPUTE, "buffer": {"type": kind}}


def _padded(memory: np.ndarray) -> bytes:
    return memory.tobytes() + bytes(-memory.size % 4)
