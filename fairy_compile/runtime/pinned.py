"""Memory of the host that a GPU copies from and to while the host goes on."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class PinnedArray:
    """A flat array in such memory; on devices other than GPUs of CUDA, in any memory.

    Attributes:
        tensor: the array as TVM's.
        array: the same elements as NumPy's.
    """

    def __init__(self, size: int, dtype: str, device: Any):
        """Allocate ``size`` elements, zeros, for copies from and to ``device``."""
        import tvm
        from tvm_ffi import DLDeviceType

        host = tvm.runtime.device(DLDeviceType.kDLCUDAHost if device.type == "cuda" else "cpu")
        self.tensor = tvm.runtime.empty((size,), dtype, host)
        nbytes = size * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * nbytes).from_address(self.tensor.data_ptr())
        self.array = np.frombuffer(memory, dtype)
        self.array[:] = 0


_MOST_BYTES = 16 << 20  # of an array that is worth such memory


class Downloads:
    """Brings arrays from a device to the host."""

    def __init__(self, device: Any):
        self._device = device
        self._memory: dict[str, PinnedArray] = {}

    def get(self, tensor: Any) -> np.ndarray:
        """Return a copy of ``tensor``, when all that was launched before is done."""
        shape, dtype = tuple(map(int, tensor.shape)), str(tensor.dtype)
        size = int(np.prod(shape))
        if self._device.type != "cuda" or size * np.dtype(dtype).itemsize > _MOST_BYTES:
            return tensor.numpy()
        # By way of memory that needs no copy by the driver, which takes longer than ours.
        memory = self._memory.get(dtype)
        if memory is None or len(memory.array) < size:
            memory = self._memory[dtype] = PinnedArray(size, dtype, self._device)
        memory.tensor._create_view(shape).copyfrom(tensor)
        self._device.sync()
        return memory.array[:size].reshape(shape).copy()
