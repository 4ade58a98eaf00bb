"""A Vulkan device for measurements: memory of the device, timestamps, many dispatches at once.

`tests.emulation.vulkan_device` dispatches one kernel at a time on memory of the host, which is
right for tests. Here weights lie in the device's memory and the device's own clock tells the times.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulation.vulkan_device import DeviceBuffer, VulkanDevice
from tests.emulation.vulkan_module import ShaderKernel, scalar_bytes

_STAGING = 64 << 20
_WHOLE_SIZE = 0xFFFFFFFFFFFFFFFF


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

    def __init__(self) -> None:
        super().__init__()
        vk = self._vk
        limits = vk.vkGetPhysicalDeviceProperties(self._physical).limits
        self._tick = limits.timestampPeriod  # nanoseconds
        memory = vk.vkGetPhysicalDeviceMemoryProperties(self._physical)
        self._local_type = next(
            i
            for i in range(memory.memoryTypeCount)
            if memory.memoryTypes[i].propertyFlags & vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
        )
        self._staging: DeviceBuffer = self._host_buffer(_STAGING)
        info = vk.VkQueryPoolCreateInfo(queryType=vk.VK_QUERY_TYPE_TIMESTAMP, queryCount=2)
        self._queries = vk.vkCreateQueryPool(self._device, info, None)

    # ----------------------------------------------------------------- memory

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
        handle = vk.vkCreateBuffer(
            self._device, vk.VkBufferCreateInfo(size=size, usage=usage), None
        )
        needs = vk.vkGetBufferMemoryRequirements(self._device, handle)
        memory = vk.vkAllocateMemory(
            self._device,
            vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=self._local_type),
            None,
        )
        vk.vkBindBufferMemory(self._device, handle, memory, 0)
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

    def _host_buffer(self, nbytes: int) -> DeviceBuffer:
        """Return mapped memory that copies may read and write."""
        vk = self._vk
        usage = vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
        handle = vk.vkCreateBuffer(
            self._device, vk.VkBufferCreateInfo(size=nbytes, usage=usage), None
        )
        needs = vk.vkGetBufferMemoryRequirements(self._device, handle)
        memory = vk.vkAllocateMemory(
            self._device,
            vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=self._memory_type),
            None,
        )
        vk.vkBindBufferMemory(self._device, handle, memory, 0)
        view = vk.vkMapMemory(self._device, memory, 0, nbytes, 0)
        address = int(vk.ffi.cast("uintptr_t", vk.ffi.from_buffer(view)))
        return DeviceBuffer(handle, memory, view, nbytes, address)

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

        self._run(record)

    # ------------------------------------------------------------------ timing

    def copy_rate(self, nbytes: int) -> float:
        """Return the bytes a second that copies on the device read and write together."""
        vk = self._vk
        source, target = self.local(nbytes), self.local(nbytes)
        region = vk.VkBufferCopy(srcOffset=0, dstOffset=0, size=nbytes)
        best = float("inf")
        for _ in range(4):
            seconds = self._clock(
                lambda c: vk.vkCmdCopyBuffer(c, source.handle, target.handle, 1, [region])
            )
            best = min(best, seconds)
        self.release(source, target)
        return 2 * nbytes / best

    def launch(self, launches: Sequence[Launch]) -> float:
        """Run launches one after the other, each waiting for the one before.

        Returns:
            Seconds between the start of the first and the end of the last, by the device's clock.
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
                vk.vkCmdPipelineBarrier(
                    command, compute, compute, 0, 1, [barrier], 0, None, 0, None
                )

        try:
            return self._clock(record)
        finally:
            vk.vkDestroyDescriptorPool(self._device, pool, None)

    def _clock(self, record: Any) -> float:
        """Run the commands that ``record`` adds and return their seconds by the device's clock."""
        vk = self._vk

        def timed(command: Any) -> None:
            vk.vkCmdResetQueryPool(command, self._queries, 0, 2)
            vk.vkCmdWriteTimestamp(command, vk.VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, self._queries, 0)
            record(command)
            vk.vkCmdWriteTimestamp(
                command, vk.VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, self._queries, 1
            )

        self._run(timed)
        data = vk.ffi.new("uint64_t[2]")
        flags = vk.VK_QUERY_RESULT_64_BIT | vk.VK_QUERY_RESULT_WAIT_BIT
        vk.vkGetQueryPoolResults(self._device, self._queries, 0, 2, 16, data, 8, flags)
        start, end = struct.unpack("<2Q", bytes(vk.ffi.buffer(data)))
        return (end - start) * self._tick * 1e-9

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
        layouts = [self._pipeline_of(launch).set_layout for launch in launches]
        sets = list(
            vk.vkAllocateDescriptorSets(
                self._device,
                vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=layouts),
            )
        )
        writes = [
            vk.VkWriteDescriptorSet(
                dstSet=descriptors,
                dstBinding=i,
                descriptorCount=1,
                descriptorType=storage,
                pBufferInfo=[
                    vk.VkDescriptorBufferInfo(buffer=b.handle, offset=0, range=_WHOLE_SIZE)
                ],
            )
            for descriptors, launch in zip(sets, launches, strict=True)
            for i, b in enumerate(launch.buffers)
        ]
        vk.vkUpdateDescriptorSets(self._device, len(writes), writes, 0, None)
        return pool, sets

    def _pipeline_of(self, launch: Launch) -> Any:
        if launch.kernel.uniform_buffer:
            raise NotImplementedError(f"{launch.kernel.name} takes its scalars in a buffer")
        packed = scalar_bytes(launch.kernel, list(launch.scalars))
        return self._pipeline(launch.kernel, len(packed))

    def _record(self, command: Any, descriptors: Any, launch: Launch) -> None:
        vk = self._vk
        pipeline, point = self._pipeline_of(launch), vk.VK_PIPELINE_BIND_POINT_COMPUTE
        vk.vkCmdBindPipeline(command, point, pipeline.handle)
        vk.vkCmdBindDescriptorSets(command, point, pipeline.layout, 0, 1, [descriptors], 0, None)
        push = scalar_bytes(launch.kernel, list(launch.scalars))
        if push:
            stage = vk.VK_SHADER_STAGE_COMPUTE_BIT
            data = vk.ffi.from_buffer(push)
            vk.vkCmdPushConstants(command, pipeline.layout, stage, 0, len(push), data)
        vk.vkCmdDispatch(command, *launch.grid)

    def _run(self, record: Any) -> None:
        """Record one command buffer, submit it and wait."""
        vk = self._vk
        info = vk.VkCommandBufferAllocateInfo(commandPool=self._commands, commandBufferCount=1)
        commands = vk.vkAllocateCommandBuffers(self._device, info)
        vk.vkBeginCommandBuffer(commands[0], vk.VkCommandBufferBeginInfo())
        record(commands[0])
        vk.vkEndCommandBuffer(commands[0])
        submit = vk.VkSubmitInfo(commandBufferCount=1, pCommandBuffers=[commands[0]])
        vk.vkQueueSubmit(self._queue, 1, [submit], vk.VK_NULL_HANDLE)
        vk.vkQueueWaitIdle(self._queue)
        vk.vkFreeCommandBuffers(self._device, self._commands, 1, commands)
