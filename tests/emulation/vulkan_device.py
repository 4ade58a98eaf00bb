"""A Vulkan device for tests: dispatches kernels through PyPI's `vulkan`, without TVM's runtime.

On a machine without a GPU the device is lavapipe (Mesa's llvmpipe), which shows that numbers are
right and says nothing about speed. The variable `DEVICE_VARIABLE` chooses a device by its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tests.emulation.vulkan_module import POINTER, ShaderKernel, scalar_bytes
from tests.emulation.vulkan_record import recorder

DEVICE_VARIABLE = "FAIRY_COMPILE_VULKAN_DEVICE"
"""Environment variable: a part of the device's name, such as ``NVIDIA``; by default the first."""
PLAIN_VARIABLE = "FAIRY_COMPILE_VULKAN_PLAIN"
"""Environment variable: if set, the device is opened without extensions."""

_WHOLE_SIZE = 0xFFFFFFFFFFFFFFFF
_MIN_BYTES = 16
_MATRICES = "VK_KHR_cooperative_matrix"
_STATISTICS = "VK_KHR_pipeline_executable_properties"


@cache
def missing_driver() -> str | None:
    """Return why no Vulkan device can be used here, or None."""
    try:
        import vulkan  # noqa: F401
    except (ImportError, OSError) as error:
        return f"needs PyPI's vulkan and the Debian package libvulkan1: {error}"
    try:
        device()
    except Exception as error:
        return f"needs a Vulkan driver, such as the Debian package mesa-vulkan-drivers: {error!r}"
    return None


@cache
def device() -> VulkanDevice:
    """Return the first device, opened once."""
    return VulkanDevice()


@dataclass(frozen=True)
class DeviceBuffer:
    """Memory of the device, mapped into the process for as long as it lives."""

    handle: Any
    memory: Any
    view: Any
    nbytes: int
    address: int

    def array(self) -> np.ndarray:
        """Return the bytes, shared with the device."""
        return np.frombuffer(self.view, np.uint8)[: self.nbytes]


class VulkanDevice:
    """One compute queue, with every feature that generated kernels may ask for.

    Attributes:
        name: of the device.
        has_matrices: whether it has cooperative matrices.
        has_statistics: whether pipelines are made so that the driver tells about them.
    """

    wants_statistics = False

    def __init__(self) -> None:
        import vulkan as vk

        self._vk = vk
        application = vk.VkApplicationInfo(
            pApplicationName="tests", apiVersion=vk.VK_MAKE_VERSION(1, 3, 0)
        )
        self._instance = vk.vkCreateInstance(
            vk.VkInstanceCreateInfo(pApplicationInfo=application), None
        )
        self._physical, self.name = self._choose(os.environ.get(DEVICE_VARIABLE, ""))
        families = vk.vkGetPhysicalDeviceQueueFamilyProperties(self._physical)
        family = next(i for i, f in enumerate(families) if f.queueFlags & vk.VK_QUEUE_COMPUTE_BIT)
        queue = vk.VkDeviceQueueCreateInfo(
            queueFamilyIndex=family, queueCount=1, pQueuePriorities=[1.0]
        )
        found = vk.vkEnumerateDeviceExtensionProperties(self._physical, None)
        names = {extension.extensionName for extension in found}
        if os.environ.get(PLAIN_VARIABLE):
            names = set()
        self.has_matrices = _MATRICES in names
        self.has_statistics = self.wants_statistics and _STATISTICS in names
        self._device = vk.vkCreateDevice(
            self._physical,
            vk.VkDeviceCreateInfo(
                pNext=self._features(),
                pQueueCreateInfos=[queue],
                ppEnabledExtensionNames=[
                    *([_MATRICES] if self.has_matrices else []),
                    *([_STATISTICS] if self.has_statistics else []),
                ],
            ),
            None,
        )
        self._queue = vk.vkGetDeviceQueue(self._device, family, 0)
        self._commands = vk.vkCreateCommandPool(
            self._device, vk.VkCommandPoolCreateInfo(queueFamilyIndex=family), None
        )
        self._memory_type = self._host_memory_type()
        self._pipelines: dict[tuple[str, bytes], _Pipeline] = {}
        self._recorder = recorder()

    def _choose(self, part: str) -> tuple[Any, str]:
        """Return the first device whose name has ``part``, in any case."""
        devices = self._vk.vkEnumeratePhysicalDevices(self._instance)
        names = [self._vk.vkGetPhysicalDeviceProperties(d).deviceName for d in devices]
        for found, name in zip(devices, names, strict=True):
            if part.lower() in name.lower():
                return found, name
        raise LookupError(
            f"{DEVICE_VARIABLE} is {part!r}; the Vulkan devices here are {', '.join(names)}"
        )

    def _features(self) -> Any:
        vk = self._vk
        chain = None
        if self.has_matrices:
            chain = vk.VkPhysicalDeviceCooperativeMatrixFeaturesKHR(cooperativeMatrix=True)
        if self.has_statistics:
            chain = vk.VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR(
                pNext=chain, pipelineExecutableInfo=True
            )
        core13 = vk.VkPhysicalDeviceVulkan13Features(pNext=chain, shaderIntegerDotProduct=True)
        core12 = vk.VkPhysicalDeviceVulkan12Features(
            pNext=core13,
            storageBuffer8BitAccess=True,
            shaderFloat16=True,
            shaderInt8=True,
            vulkanMemoryModel=self.has_matrices,
        )
        core11 = vk.VkPhysicalDeviceVulkan11Features(pNext=core12, storageBuffer16BitAccess=True)
        core = vk.VkPhysicalDeviceFeatures(shaderInt64=True, shaderInt16=True, shaderFloat64=True)
        return vk.VkPhysicalDeviceFeatures2(pNext=core11, features=core)

    def _host_memory_type(self) -> int:
        vk = self._vk
        found = vk.vkGetPhysicalDeviceMemoryProperties(self._physical)
        wanted = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
        return next(
            i
            for i in range(found.memoryTypeCount)
            if found.memoryTypes[i].propertyFlags & wanted == wanted
        )

    # ----------------------------------------------------------------- memory

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Return new memory for storage and uniform buffers."""
        vk = self._vk
        usage = vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | vk.VK_BUFFER_USAGE_UNIFORM_BUFFER_BIT
        return self._mapped_buffer(nbytes, usage)

    def _mapped_buffer(self, nbytes: int, usage: int) -> DeviceBuffer:
        """Return new memory that the host sees, for what ``usage`` says."""
        vk = self._vk
        size = max(nbytes, _MIN_BYTES)
        handle, memory = self._buffer(size, usage, self._memory_type)
        view = vk.vkMapMemory(self._device, memory, 0, size, 0)
        address = int(vk.ffi.cast("uintptr_t", vk.ffi.from_buffer(view)))
        return DeviceBuffer(handle, memory, view, nbytes, address)

    def _buffer(self, size: int, usage: int, memory_type: int) -> tuple[Any, Any]:
        """Return a new buffer and its memory."""
        vk = self._vk
        handle = vk.vkCreateBuffer(
            self._device, vk.VkBufferCreateInfo(size=size, usage=usage), None
        )
        needs = vk.vkGetBufferMemoryRequirements(self._device, handle)
        memory = vk.vkAllocateMemory(
            self._device,
            vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=memory_type),
            None,
        )
        vk.vkBindBufferMemory(self._device, handle, memory, 0)
        return handle, memory

    def free(self, buffer: DeviceBuffer) -> None:
        """Give memory back."""
        self._vk.vkDestroyBuffer(self._device, buffer.handle, None)
        self._vk.vkFreeMemory(self._device, buffer.memory, None)

    # --------------------------------------------------------------- dispatch

    def run(
        self,
        kernel: ShaderKernel,
        arrays: Sequence[np.ndarray],
        grid: tuple[int, int, int],
        scalars: Sequence[Any] = (),
    ) -> None:
        """Run a kernel on NumPy arrays, in place."""
        buffers = [self.allocate(array.nbytes) for array in arrays]
        try:
            for array, buffer in zip(arrays, buffers, strict=True):
                buffer.array()[:] = np.frombuffer(array.tobytes(), np.uint8)
            self.dispatch(kernel, buffers, grid, scalars)
            for array, buffer in zip(arrays, buffers, strict=True):
                array[...] = buffer.array().view(array.dtype).reshape(array.shape)
        finally:
            for buffer in buffers:
                self.free(buffer)

    def dispatch(
        self,
        kernel: ShaderKernel,
        buffers: Sequence[DeviceBuffer],
        grid: tuple[int, int, int],
        scalars: Sequence[Any] = (),
    ) -> None:
        """Run a kernel on buffers and wait for it, as TVM's runtime would."""
        vk = self._vk
        expected = sum(code == POINTER for code, _, _ in kernel.arguments)
        assert len(buffers) == expected, f"{kernel.name} takes {expected} buffers"
        packed = scalar_bytes(kernel, list(scalars))
        pipeline = self._pipeline(kernel, len(packed))
        bound, uniform = list(buffers), None
        if kernel.uniform_buffer:
            uniform = self.allocate(len(packed))
            uniform.array()[:] = np.frombuffer(packed, np.uint8)
            bound.append(uniform)
        writes = self._descriptor_writes(pipeline.descriptors, bound, pipeline.types)
        vk.vkUpdateDescriptorSets(self._device, len(writes), writes, 0, None)
        records = self._recorder is not None and self._recorder.wants(
            kernel, sum(buffer.nbytes for buffer in buffers)
        )
        before = [buffer.array().tobytes() for buffer in buffers] if records else []
        push = packed if not kernel.uniform_buffer else b""
        self._submit(lambda c: self._dispatch(c, pipeline, pipeline.descriptors, push, grid))
        if records:
            after = [buffer.array().tobytes() for buffer in buffers]
            self._recorder.add(kernel, grid, scalars, before, after)
        if uniform is not None:
            self.free(uniform)

    def _descriptor_writes(
        self, descriptors: Any, buffers: Sequence[Any], types: Sequence[Any]
    ) -> list[Any]:
        """Return the writes of whole buffers to the bindings 0, 1, ... of a set."""
        vk = self._vk
        return [
            vk.VkWriteDescriptorSet(
                dstSet=descriptors,
                dstBinding=i,
                descriptorCount=1,
                descriptorType=types[i],
                pBufferInfo=[
                    vk.VkDescriptorBufferInfo(buffer=b.handle, offset=0, range=_WHOLE_SIZE)
                ],
            )
            for i, b in enumerate(buffers)
        ]

    def _dispatch(
        self,
        command: Any,
        pipeline: _Pipeline,
        descriptors: Any,
        push: bytes,
        grid: tuple[int, int, int],
    ) -> None:
        """Record a kernel with its bound buffers and push constants."""
        vk = self._vk
        point = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        vk.vkCmdBindPipeline(command, point, pipeline.handle)
        vk.vkCmdBindDescriptorSets(command, point, pipeline.layout, 0, 1, [descriptors], 0, None)
        if push:
            stage = vk.VK_SHADER_STAGE_COMPUTE_BIT
            data = vk.ffi.from_buffer(push)
            vk.vkCmdPushConstants(command, pipeline.layout, stage, 0, len(push), data)
        vk.vkCmdDispatch(command, *grid)

    def _submit(
        self, record: Callable[[Any], None], again: Callable[[], bool] | None = None
    ) -> None:
        """Record one command buffer, submit it and wait, for as long as ``again()`` says."""
        vk = self._vk
        info = vk.VkCommandBufferAllocateInfo(commandPool=self._commands, commandBufferCount=1)
        commands = vk.vkAllocateCommandBuffers(self._device, info)
        vk.vkBeginCommandBuffer(commands[0], vk.VkCommandBufferBeginInfo())
        record(commands[0])
        vk.vkEndCommandBuffer(commands[0])
        submit = vk.VkSubmitInfo(commandBufferCount=1, pCommandBuffers=[commands[0]])
        while True:
            vk.vkQueueSubmit(self._queue, 1, [submit], vk.VK_NULL_HANDLE)
            vk.vkQueueWaitIdle(self._queue)
            if again is None or not again():
                break
        vk.vkFreeCommandBuffers(self._device, self._commands, 1, commands)

    def _pipeline(self, kernel: ShaderKernel, push_bytes: int) -> _Pipeline:
        key = (kernel.name, kernel.code)
        if key not in self._pipelines:
            self._pipelines[key] = self._create_pipeline(kernel, push_bytes)
        return self._pipelines[key]

    def forget_pipelines(self) -> None:
        """Free all pipelines; for tests that make thousands."""
        vk = self._vk
        for pipeline in self._pipelines.values():
            vk.vkDestroyPipeline(self._device, pipeline.handle, None)
            vk.vkDestroyPipelineLayout(self._device, pipeline.layout, None)
            vk.vkDestroyDescriptorPool(self._device, pipeline.pool, None)
            vk.vkDestroyDescriptorSetLayout(self._device, pipeline.set_layout, None)
            vk.vkDestroyShaderModule(self._device, pipeline.shader, None)
        self._pipelines.clear()

    def _create_pipeline(self, kernel: ShaderKernel, push_bytes: int) -> _Pipeline:
        vk = self._vk
        stage = vk.VK_SHADER_STAGE_COMPUTE_BIT
        storage = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER
        uniform = vk.VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER
        types = [storage for code, _, _ in kernel.arguments if code == POINTER]
        if kernel.uniform_buffer:
            types.append(uniform)
        bindings = [
            vk.VkDescriptorSetLayoutBinding(
                binding=i, descriptorType=kind, descriptorCount=1, stageFlags=stage
            )
            for i, kind in enumerate(types)
        ]
        set_layout = vk.vkCreateDescriptorSetLayout(
            self._device, vk.VkDescriptorSetLayoutCreateInfo(pBindings=bindings), None
        )
        pushes = push_bytes and not kernel.uniform_buffer
        ranges = [vk.VkPushConstantRange(stageFlags=stage, offset=0, size=push_bytes)]
        layout = vk.vkCreatePipelineLayout(
            self._device,
            vk.VkPipelineLayoutCreateInfo(
                pSetLayouts=[set_layout], pPushConstantRanges=ranges if pushes else []
            ),
            None,
        )
        code = kernel.code
        shader = vk.vkCreateShaderModule(
            self._device, vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=code), None
        )
        entry = vk.VkPipelineShaderStageCreateInfo(stage=stage, module=shader, pName=kernel.name)
        created = vk.vkCreateComputePipelines(
            self._device,
            None,
            1,
            [
                vk.VkComputePipelineCreateInfo(
                    flags=vk.VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR
                    if self.has_statistics
                    else 0,
                    stage=entry,
                    layout=layout,
                )
            ],
            None,
        )
        sizes = [
            vk.VkDescriptorPoolSize(type=kind, descriptorCount=max(1, types.count(kind)))
            for kind in (storage, uniform)
        ]
        pool = vk.vkCreateDescriptorPool(
            self._device, vk.VkDescriptorPoolCreateInfo(maxSets=1, pPoolSizes=sizes), None
        )
        descriptors = vk.vkAllocateDescriptorSets(
            self._device,
            vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=[set_layout]),
        )
        return _Pipeline(created[0], layout, set_layout, shader, pool, descriptors[0], types)


@dataclass(frozen=True)
class _Pipeline:
    handle: Any
    layout: Any
    set_layout: Any
    shader: Any
    pool: Any
    descriptors: Any
    types: list[Any]
