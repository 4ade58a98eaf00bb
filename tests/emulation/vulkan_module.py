"""Reading Vulkan modules back from an exported library's bytes, without TVM's Vulkan runtime.

Written from the format's description alone, so that it checks what `fairy_compile.codegen` wrote.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTER = 3  # DLPack's code of an opaque handle


@dataclass(frozen=True)
class ShaderKernel:
    """A kernel of a module: its arguments as (code, bits, lanes), and its SPIR-V."""

    name: str
    arguments: tuple[tuple[int, int, int], ...]
    launch_tags: tuple[str, ...]
    uniform_buffer: bool
    code: bytes


class _Reader:
    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def length(self) -> int:
        return self.numbers("<Q")[0]

    def bytes(self) -> bytes:
        size = self.length()
        self._at += size
        return self._data[self._at - size : self._at]

    def text(self) -> str:
        return self.bytes().decode()

    def at_end(self) -> bool:
        return self._at == len(self._data)


def parse_module(data: bytes) -> dict[str, ShaderKernel]:
    """Return the kernels of a module by name."""
    reader = _Reader(data)
    assert reader.text() == "vulkan"
    infos, kernels = {}, {}
    for _ in range(reader.length()):
        key, name = reader.text(), reader.text()
        arguments = tuple(reader.numbers("<BBH") for _ in range(reader.length()))
        tags = tuple(reader.text() for _ in range(reader.length()))
        extra = [reader.numbers("<i")[0] for _ in range(reader.length())]
        assert key == name
        assert extra == [0] * len(arguments)
        infos[key] = (arguments, tags)
    for _ in range(reader.length()):
        name, shader = reader.text(), _Reader(reader.bytes())
        (flags,) = shader.numbers("<I")
        words = shader.length()
        code = b"".join(struct.pack("<I", *shader.numbers("<I")) for _ in range(words))
        assert shader.at_end()
        assert flags in (0, 1)
        kernels[name] = ShaderKernel(name, *infos[name], bool(flags), code)
    assert reader.at_end()
    assert kernels.keys() == infos.keys()
    return kernels


def modules_in(blob: bytes) -> list[bytes]:
    """Return the bytes of every Vulkan module in an export or a library file.

    TVM files modules by kind: the kind as a string, then the module's bytes, which begin with a
    string of their own.
    """
    kind = struct.pack("<Q", len("vulkan")) + b"vulkan"
    modules, at = [], blob.find(kind)
    while at >= 0:
        start = at + len(kind) + 8
        at += 1
        if blob[start : start + len(kind)] == kind:
            (size,) = struct.unpack_from("<Q", blob, start - 8)
            modules.append(blob[start : start + size])
            at = start + size
        at = blob.find(kind, at)
    return modules


def kernels_in(blob: bytes) -> dict[str, ShaderKernel]:
    """Return all kernels of an export or a library file by name."""
    modules = [parse_module(data) for data in modules_in(blob)]
    return {name: kernel for module in modules for name, kernel in module.items()}


def kernels_of(executable: Any) -> dict[str, ShaderKernel]:
    """Return all kernels of a compiled module, from the bytes that an export would hold."""
    import tvm  # here, so that machines without TVM can read modules

    pack = tvm.get_global_func("runtime.ModulePackImportsToTensor")
    return kernels_in(pack(executable.mod).numpy().tobytes())


def scalar_bytes(kernel: ShaderKernel, values: list[Any]) -> bytes:
    """Return the scalar arguments as the runtime packs them: 8 bytes each."""
    types = [argument for argument in kernel.arguments if argument[0] != POINTER]
    layouts = {
        (0, 32): np.int32,
        (1, 32): np.uint32,
        (2, 32): np.float32,
        (0, 64): np.int64,
        (1, 64): np.uint64,
        (2, 64): np.float64,
    }
    slots = [
        layouts[code, bits](value).tobytes().ljust(8, b"\0")
        for (code, bits, _), value in zip(types, values, strict=True)
    ]
    return b"".join(slots)


_NAME, _TYPE_INT, _TYPE_FLOAT, _VARIABLE, _POINTER, _DECORATE = 5, 21, 22, 59, 32, 71
_VECTOR, _RUNTIME_ARRAY, _STRUCT = 23, 29, 30
_BINDING = 33


def bound_buffers(code: bytes) -> dict[int, tuple[str, str]]:
    """Return (name, NumPy type of its elements) of every buffer by its binding, from the SPIR-V."""
    words = np.frombuffer(code, "<u4").tolist()
    names: dict[int, str] = {}
    scalars: dict[int, str] = {}
    inner: dict[int, int] = {}  # vector, array, struct, pointer or variable -> what it is made of
    bindings: dict[int, int] = {}
    at = 5
    while at < len(words):
        count, op = words[at] >> 16, words[at] & 0xFFFF
        operands = words[at + 1 : at + count]
        if op == _NAME:
            text = np.array(operands[1:], "<u4").tobytes()
            names[operands[0]] = text.split(b"\0")[0].decode()
        elif op == _TYPE_INT:
            scalars[operands[0]] = f"{'int' if operands[2] else 'uint'}{operands[1]}"
        elif op == _TYPE_FLOAT:
            scalars[operands[0]] = f"float{operands[1]}"
        elif op in (_VECTOR, _RUNTIME_ARRAY, _STRUCT) and len(operands) > 1:
            inner[operands[0]] = operands[1]
        elif op == _POINTER:
            inner[operands[0]] = operands[2]
        elif op == _VARIABLE:
            inner[operands[1]] = operands[0]
        elif op == _DECORATE and operands[1] == _BINDING:
            bindings[operands[2]] = operands[0]
        at += count
    found = {}
    for binding, variable in bindings.items():
        element = variable
        while element not in scalars:
            element = inner[element]
        found[binding] = (names.get(variable, ""), scalars[element])
    return found
