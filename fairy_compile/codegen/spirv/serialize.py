"""The bytes of a Vulkan module, as TVM's Vulkan runtime reads them.

Little endian; strings and byte strings are a 64-bit length and the data. A module is::

    string  "vulkan"
    u64     number of kernels, then for each: string name, FunctionInfo
    u64     number of kernels, then for each: string name, bytes shader

    FunctionInfo = string name
                   u64 + data types of the arguments, each u8 code, u8 bits, u16 lanes
                   u64 + strings, the launch parameters
                   u64 + i32 for each argument, its extra tag
    shader       = u32 flags, u64 number of words, the words
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from fairy_compile.codegen.spirv.dtypes import DType, Kind
from fairy_compile.codegen.spirv.kernel import Kernel

MODULE_KIND = "vulkan"

# DLPack's data type codes.
_DTYPE_CODES = {Kind.INT: 0, Kind.UINT: 1, Kind.FLOAT: 2, Kind.BOOL: 6}
_POINTER = (3, 64, 1)  # DLPack's opaque handle

_USES_UNIFORM_BUFFER = 1
_NO_EXTRA_TAG = 0


def module_bytes(kernels: Sequence[Kernel]) -> bytes:
    """Return the bytes of a module of the given kernels."""
    names = [_text(kernel.name) for kernel in kernels]
    infos = [_function_info(kernel) for kernel in kernels]
    shaders = [_bytes(_shader(kernel)) for kernel in kernels]
    return b"".join(
        [
            _text(MODULE_KIND),
            _sequence([name + info for name, info in zip(names, infos, strict=True)]),
            _sequence([name + shader for name, shader in zip(names, shaders, strict=True)]),
        ]
    )


def _function_info(kernel: Kernel) -> bytes:
    return b"".join(
        [
            _text(kernel.name),
            _sequence([_data_type(dtype) for dtype in kernel.arguments]),
            _sequence([_text(tag) for tag in kernel.launch_tags]),
            _sequence([struct.pack("<i", _NO_EXTRA_TAG) for _ in kernel.arguments]),
        ]
    )


def _shader(kernel: Kernel) -> bytes:
    flags = _USES_UNIFORM_BUFFER if kernel.uniform_buffer else 0
    return struct.pack("<IQ", flags, len(kernel.code) // 4) + kernel.code


def _data_type(dtype: DType | None) -> bytes:
    if dtype is None:
        return struct.pack("<BBH", *_POINTER)
    return struct.pack("<BBH", _DTYPE_CODES[dtype.kind], dtype.bits, dtype.lanes)


def _sequence(items: Sequence[bytes]) -> bytes:
    return struct.pack("<Q", len(items)) + b"".join(items)


def _text(text: str) -> bytes:
    return _bytes(text.encode())


def _bytes(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data
