"""Imports and exports of a WebAssembly module, and what TVM's JavaScript runtime allows of them.

Read after the binary format of the WebAssembly core specification, section 5.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fairy_compile.errors import ModelFileError

ALLOWED_IMPORTS = frozenset(
    {
        ("env", "TVMFFIWasmSafeCall"),
        ("env", "TVMFFIWasmFunctionDeleter"),
        ("env", "emscripten_notify_memory_growth"),
        *(
            ("wasi_snapshot_preview1", name)
            for name in (
                "clock_time_get",
                "environ_get",
                "environ_sizes_get",
                "fd_close",
                "fd_read",
                "fd_seek",
                "fd_write",
                "proc_exit",
            )
        ),
    }
)
"""What TVM's JavaScript runtime offers a module."""

REQUIRED_EXPORTS = (
    "TVMFFIAnyViewToOwnedAny",
    "TVMFFIDataTypeToString",
    "TVMFFIErrorSetRaisedFromCStr",
    "TVMFFIFunctionCall",
    "TVMFFIFunctionGetGlobal",
    "TVMFFIFunctionSetGlobal",
    "TVMFFIGetTypeInfo",
    "TVMFFIObjectDecRef",
    "TVMFFIObjectIncRef",
    "TVMFFITypeKeyToIndex",
    "TVMFFIWasmFunctionCreate",
    "TVMFFIWasmGetLastError",
    "TVMWasmAllocSpace",
    "TVMWasmFreeSpace",
    "_initialize",
    "memory",
)
"""What TVM's JavaScript runtime uses of a module."""

_MAGIC = b"\0asm\x01\0\0\0"
_IMPORT_SECTION, _EXPORT_SECTION = 2, 7


@dataclass(frozen=True)
class Interface:
    """What a module imports, as (module, name), and the names it exports."""

    imports: tuple[tuple[str, str], ...]
    exports: tuple[str, ...]


def check_module(path: Path) -> list[str]:
    """Return why TVM's JavaScript runtime could not load a module, in words; empty if it can.

    Raises:
        ModelFileError: the file is not a WebAssembly module.
    """
    interface = read_interface(path.read_bytes())
    problems = [
        f"it imports {'.'.join(item)}, which is not offered"
        for item in interface.imports
        if item not in ALLOWED_IMPORTS
    ]
    exported = frozenset(interface.exports)
    return problems + [f"it lacks {name}" for name in REQUIRED_EXPORTS if name not in exported]


def read_interface(data: bytes) -> Interface:
    """Return the interface of a module.

    Raises:
        ModelFileError: the bytes are not a WebAssembly module, or are cut off.
    """
    if not data.startswith(_MAGIC):
        raise ModelFileError("not a WebAssembly module of version 1")
    imports: list[tuple[str, str]] = []
    exports: list[str] = []
    reader = _Reader(data, len(_MAGIC), len(data))
    while reader.left():
        kind, size = reader.byte(), reader.number()
        section = reader.part(size)
        if kind == _IMPORT_SECTION:
            for _ in range(section.number()):
                imports.append((section.name(), section.name()))
                section.skip_import()
        elif kind == _EXPORT_SECTION:
            for _ in range(section.number()):
                exports.append(section.name())
                section.byte()
                section.number()
    return Interface(tuple(imports), tuple(exports))


class _Reader:
    """Reads bytes between two offsets."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self._data, self._at, self._end = data, start, end

    def left(self) -> int:
        return self._end - self._at

    def byte(self) -> int:
        if not self.left():
            raise ModelFileError("the WebAssembly module is cut off")
        self._at += 1
        return self._data[self._at - 1]

    def number(self) -> int:
        """Read an unsigned LEB128 number of at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ModelFileError("the WebAssembly module has a number that does not end")

    def part(self, size: int) -> _Reader:
        """Return a reader of the next ``size`` bytes, and go on after them."""
        if size > self.left():
            raise ModelFileError("the WebAssembly module is cut off")
        start, self._at = self._at, self._at + size
        return _Reader(self._data, start, self._at)

    def name(self) -> str:
        size = self.number()
        part = self.part(size)
        try:
            return self._data[part._at : part._end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError("the WebAssembly module has a name that is not text") from error

    def skip_import(self) -> None:
        """Pass over what is imported: a function, table, memory or global."""
        kind = self.byte()
        if kind == 0:
            self.number()
        elif kind in (1, 2):
            if kind == 1:
                self.byte()
            has_maximum = self.byte() & 1
            for _ in range(1 + has_maximum):
                self.number()
        elif kind == 3:
            self.part(2)
        else:
            raise ModelFileError(f"the WebAssembly module imports something of kind {kind}")
