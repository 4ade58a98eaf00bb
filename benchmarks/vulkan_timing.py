"""A Vulkan device for measurements: memory of the device, timestamps, many dispatches at once.

`tests.emulation.vulkan_device` dispatches one kernel at a time on memory of the host, which is
right for tests. Here weights lie in the device's memory and the device's own clock tells the times.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulation.vulkan_device import DeviceBuffer, VulkanDevice
from tests.emulation.vulkan_module import ShaderKernel, scalar_bytes

_STAGING = 64 << 20


@dataclass(frozen=True)
class LocalBuffer:
    """Memory of the device that the host cannot see."""

    handle: Any
    memory: Any
    nbytes: int


@dataclass(frozen=True)
class Launch:
    """One dispatch: a kernel, its buffers in order, its scalars, its grid."""

    kernel: ShaderKernel
    buffers: Sequence[LocalBuffer]
    scalars: Sequence[Any]
    grid: tuple[int, int, int]


class TimedDevice(VulkanDevice):
    """`VulkanDevice` with local memory and timestamps."""

    wants_statistics = True

    def __init__(self) -> None:
        super().__init__()
        vk = self._vk
        limits = vk.vkGetPhysicalDeviceProperties(self._physical).limits
        self._tick = limits.timestampPeriod  # nanoseconds
        self.memory_types = self._memory_types()
        self._local_type = self._choose_local_type()
        usage = vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
        self._staging: DeviceBuffer = self._mapped_buffer(_STAGING, usage)
        info = vk.VkQueryPoolCreateInfo(queryType=vk.VK_QUERY_TYPE_TIMESTAMP, queryCount=2)
        self._queries = vk.vkCreateQueryPool(self._device, info, None)

    # ----------------------------------------------------------------- memory

    def _memory_types(self) -> list[dict[str, Any]]:
        """Return what kinds of memory there are, for the record."""
        vk = self._vk
        memory = vk.vkGetPhysicalDeviceMemoryProperties(self._physical)
        types = [memory.memoryTypes[i] for i in range(memory.memoryTypeCount)]
        return [
            {
                "heap": kind.heapIndex,
                "heap_bytes": memory.memoryHeaps[kind.heapIndex].size,
                "device_local": bool(kind.propertyFlags & vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT),
                "host_visible": bool(kind.propertyFlags & vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT),
            }
            for kind in types
        ]

    def _choose_local_type(self) -> int:
        """Return the first type that is the device's own, rather one the host cannot see."""
        local = [i for i, kind in enumerate(self.memory_types) if kind["device_local"]]
        return min(local, key=lambda i: self.memory_types[i]["host_visible"])

    def local(self, nbytes: int) -> LocalBuffer:
        """Return new memory of the device.

        Raises:
            VkErrorOutOfDeviceMemory: there is none.
        """
        vk = self._vk
        usage = (
            vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
            | vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT
            | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
        )
        size = max(16, -(-nbytes // 4) * 4)
        handle, memory = self._buffer(size, usage, self._local_type)
        return LocalBuffer(handle, memory, size)

    def release(self, *buffers: LocalBuffer) -> None:
        """Give memory of the device back."""
        for buffer in buffers:
            self._vk.vkDestroyBuffer(self._device, buffer.handle, None)
            self._vk.vkFreeMemory(self._device, buffer.memory, None)

    def upload(self, array: np.ndarray) -> LocalBuffer:
        """Return memory of the device that holds ``array``."""
        buffer = self.local(array.nbytes)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        padded = flat if flat.size % 4 == 0 else np.concatenate([flat, np.zeros(3, np.uint8)])
        for start in range(0, flat.size, _STAGING):
            part = padded[start : min(start + _STAGING, padded.size // 4 * 4)]
            self._staging.array()[: part.size] = part
            self._copy(self._staging.handle, 0, buffer.handle, start, part.size)
        return buffer

    def download(self, buffer: LocalBuffer, like: np.ndarray) -> np.ndarray:
        """Return the contents of a buffer of at most 64 MiB, shaped and typed as ``like``."""
        self._copy(buffer.handle, 0, self._staging.handle, 0, buffer.nbytes)
        return self._staging.array()[: like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def duplicate(self, buffer: LocalBuffer) -> LocalBuffer:
        """Return a copy on the device."""
        copy = self.local(buffer.nbytes)
        self._copy(buffer.handle, 0, copy.handle, 0, buffer.nbytes)
        return copy

    def _copy(self, source: Any, at: int, target: Any, to: int, nbytes: int) -> None:
        vk = self._vk
        region = vk.VkBufferCopy(srcOffset=at, dstOffset=to, size=nbytes)
        everything = vk.VkMemoryBarrier(
            srcAccessMask=vk.VK_ACCESS_MEMORY_WRITE_BIT | vk.VK_ACCESS_MEMORY_READ_BIT,
            dstAccessMask=vk.VK_ACCESS_MEMORY_WRITE_BIT | vk.VK_ACCESS_MEMORY_READ_BIT,
        )
        stage = vk.VK_PIPELINE_STAGE_ALL_COMMANDS_BIT

        def record(command: Any) -> None:
            vk.vkCmdPipelineBarrier(command, stage, stage, 0, 1, [everything], 0, None, 0, None)
            vk.vkCmdCopyBuffer(command, source, target, 1, [region])
            vk.vkCmdPipelineBarrier(command, stage, stage, 0, 1, [everything], 0, None, 0, None)

        self._submit(record)

    # ------------------------------------------------------------------ timing

    def copy_rate(self, nbytes: int, seconds: float = 0.5) -> float:
        """Return the bytes a second that copies on the device read and write together."""
        vk = self._vk
        source, target = self.local(nbytes), self.local(nbytes)
        region = vk.VkBufferCopy(srcOffset=0, dstOffset=0, size=nbytes)
        found = self._clock(
            lambda c: vk.vkCmdCopyBuffer(c, source.handle, target.handle, 1, [region]), seconds
        )
        self.release(source, target)
        return 2 * nbytes / found

    def launch(
        self, launches: Sequence[Launch], seconds: float = 0.0, overlap: bool = False
    ) -> float:
        """Run launches one after the other, again and again for ``seconds``, at least once.

        Args:
            launches: what to run.
            seconds: for how long. Clocks rise only under load, and fall within a second without.
            overlap: launches do not wait for those before them.

        Returns:
            Seconds between the start of the first launch and the end of the last, by the device's
            clock: the median of the second half of the runs.
        """
        vk = self._vk
        barrier = vk.VkMemoryBarrier(
            srcAccessMask=vk.VK_ACCESS_SHADER_WRITE_BIT,
            dstAccessMask=vk.VK_ACCESS_SHADER_READ_BIT | vk.VK_ACCESS_SHADER_WRITE_BIT,
        )
        compute = vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT
        pool, sets = self._descriptor_sets(launches)

        def record(command: Any) -> None:
            for descriptors, launch in zip(sets, launches, strict=True):
                self._record(command, descriptors, launch)
                if not overlap:
                    vk.vkCmdPipelineBarrier(
                        command, compute, compute, 0, 1, [barrier], 0, None, 0, None
                    )

        try:
            return self._clock(record, seconds)
        finally:
            vk.vkDestroyDescriptorPool(self._device, pool, None)

    def _clock(self, record: Callable[[Any], None], seconds: float = 0.0) -> float:
        """Run the commands that ``record`` adds for ``seconds``; return the median of their own."""
        vk = self._vk

        def timed(command: Any) -> None:
            vk.vkCmdResetQueryPool(command, self._queries, 0, 2)
            vk.vkCmdWriteTimestamp(command, vk.VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, self._queries, 0)
            record(command)
            vk.vkCmdWriteTimestamp(
                command, vk.VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, self._queries, 1
            )

        data = vk.ffi.new("uint64_t[2]")
        flags = vk.VK_QUERY_RESULT_64_BIT | vk.VK_QUERY_RESULT_WAIT_BIT
        times: list[float] = []

        def read() -> bool:
            vk.vkGetQueryPoolResults(self._device, self._queries, 0, 2, 16, data, 8, flags)
            start, end = struct.unpack("<2Q", bytes(vk.ffi.buffer(data)))
            times.append((end - start) * self._tick * 1e-9)
            return time.monotonic() < until

        until = time.monotonic() + seconds
        self._submit(timed, read)
        return float(np.median(times[len(times) // 2 :]))

    def _descriptor_sets(self, launches: Sequence[Launch]) -> tuple[Any, list[Any]]:
        vk = self._vk
        storage = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER
        count = sum(len(launch.buffers) for launch in launches)
        size = vk.VkDescriptorPoolSize(type=storage, descriptorCount=count)
        pool = vk.vkCreateDescriptorPool(
            self._device,
            vk.VkDescriptorPoolCreateInfo(maxSets=len(launches), pPoolSizes=[size]),
            None,
        )
        pipelines = [self._pipeline_of(launch) for launch in launches]
        layouts = [pipeline.set_layout for pipeline in pipelines]
        sets = list(
            vk.vkAllocateDescriptorSets(
                self._device,
                vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=layouts),
            )
        )
        writes = [
            write
            for descriptors, launch, pipeline in zip(sets, launches, pipelines, strict=True)
            for write in self._descriptor_writes(descriptors, launch.buffers, pipeline.types)
        ]
        vk.vkUpdateDescriptorSets(self._device, len(writes), writes, 0, None)
        return pool, sets

    def statistics(self, launch: Launch) -> dict[str, int]:
        """Return what the driver tells of a kernel's machine code, such as its registers."""
        if not self.has_statistics:
            return {}
        vk, ffi = self._vk, self._vk.ffi
        from vulkan._vulkan import lib

        function = ffi.cast(
            "PFN_vkGetPipelineExecutableStatisticsKHR",
            lib.vkGetDeviceProcAddr(
                self._device, ffi.new("char[]", b"vkGetPipelineExecutableStatisticsKHR")
            ),
        )
        info = ffi.new("VkPipelineExecutableInfoKHR*")
        info.sType = vk.VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR
        info.pipeline = self._pipeline_of(launch).handle
        count = ffi.new("uint32_t*")
        if function == ffi.NULL or function(self._device, info, count, ffi.NULL):
            return {}
        found = ffi.new("VkPipelineExecutableStatisticKHR[]", count[0])
        for i in range(count[0]):
            found[i].sType = vk.VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR
        function(self._device, info, count, found)
        return {ffi.string(s.name).decode(): int(s.value.u64) for s in found}

    def _pipeline_of(self, launch: Launch) -> Any:
        if launch.kernel.uniform_buffer:
            raise NotImplementedError(f"{launch.kernel.name} takes its scalars in a buffer")
        packed = scalar_bytes(launch.kernel, list(launch.scalars))
        return self._pipeline(launch.kernel, len(packed))

    def _record(self, command: Any, descriptors: Any, launch: Launch) -> None:
        push = scalar_bytes(launch.kernel, list(launch.scalars))
        self._dispatch(command, self._pipeline_of(launch), descriptors, push, launch.grid)


class NvidiaClocks:
    """Keeps the clocks of an NVIDIA GPU up, and reads them.

    The driver raises clocks at once for a process with a CUDA context, but for Vulkan alone only
    under a load of its own judgement. A context that does nothing makes times comparable with those
    of CUDA. Without the libraries this does nothing.
    """

    def __init__(self) -> None:
        self.context = self._open_context()
        self._nvml = self._load("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        if self._nvml is not None and (
            self._nvml.nvmlInit_v2()
            or self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._handle))
        ):
            self._nvml = None

    @staticmethod
    def _load(name: str) -> ctypes.CDLL | None:
        try:
            return ctypes.CDLL(name)
        except OSError:
            return None

    def _open_context(self) -> bool:
        cuda = self._load("libcuda.so.1")
        context, device = ctypes.c_void_p(), ctypes.c_int()
        return cuda is not None and not (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(device), 0)
            or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        )

    def read(self) -> dict[str, int]:
        """Return the clocks of multiprocessors and memory in MHz, where they can be read."""
        found = {}
        for name, number in (("sm_mhz", 1), ("memory_mhz", 2)):
            value = ctypes.c_uint()
            if self._nvml is not None and not self._nvml.nvmlDeviceGetClockInfo(
                self._handle, number, ctypes.byref(value)
            ):
                found[name] = value.value
        return found
