"""Device modules of a library, taken apart, and a device of host memory to run them on."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

HERE = Path(__file__).parent
CXX = "clang++-22"
_INTEGER, _FLOAT = 0, 2  # DLPack's type codes


@dataclass(frozen=True)
class Kernel:
    """One kernel of a device module.

    Attributes:
        name: its name in the source.
        symbol: the name the host calls it by.
        arguments: (type code, bits) of each argument; buffers are handles.
        launch: thread tags whose extents follow the arguments.
        source: text it is defined in.
    """

    name: str
    symbol: str
    arguments: tuple[tuple[int, int], ...]
    launch: tuple[str, ...]
    source: str

    def is_float(self, argument: int) -> bool:
        """Whether an argument is a floating-point number."""
        return self.arguments[argument][0] == _FLOAT


class _Reader:
    """Reads TVM's little-endian serialisation."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def count(self) -> int:
        return self.take("Q")[0]

    def text(self) -> str:
        length = self.count()
        self.at += length
        return self.data[self.at - length : self.at].decode()


def read_module(data: bytes, whole: bool = False) -> list[Kernel]:
    """Return the kernels of a serialised Metal or OpenCL module.

    Args:
        data: the module's bytes.
        whole: the module keeps one text for all kernels (OpenCL), not one each (Metal).
    """
    reader = _Reader(bytes(data))
    if not whole:
        reader.text()  # format
    else:
        source = reader.text()
        reader.text()
    found = {}
    for _ in range(reader.count()):
        symbol, name = reader.text(), reader.text()
        arguments = tuple(reader.take("BBH")[:2] for _ in range(reader.count()))
        launch = tuple(reader.text() for _ in range(reader.count()))
        reader.take(f"{reader.count()}i")
        found[symbol] = (name, arguments, launch)
    sources = {s: source for s in found} if whole else dict(_pairs(reader))
    return [Kernel(name, s, a, t, sources[s]) for s, (name, a, t) in found.items()]


def _pairs(reader: _Reader) -> list[tuple[str, str]]:
    return [(reader.text(), reader.text()) for _ in range(reader.count())]


@cache
def install_device(kind: str, directory: Path) -> None:
    """Give this process a device of ``kind``, for good; see ``gpu_device.cc``."""
    library = directory / f"{kind}_device.so"
    site = Path(tvm.__file__).parent
    ffi = Path(tvm_ffi.__file__).parent
    includes = [site / "include", ffi / "include"]
    command = [
        CXX, "-std=c++17", "-O1", "-shared", "-fPIC", f'-DDEVICE_API="device_api.{kind}"',
        *(f"-I{path}" for path in includes), "-o", str(library), str(HERE / "gpu_device.cc"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def on_load(kind: str, load: Callable[[bytes], Any]) -> None:
    """Open the device modules of libraries with ``load``."""
    tvm_ffi.register_global_func(f"ffi.Module.load_from_bytes.{kind}", load, override=True)
