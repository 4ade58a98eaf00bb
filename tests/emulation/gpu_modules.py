"""Device modules of a library, taken apart, and a device of host memory to run them on."""

from __future__ import annotations

import ctypes
import hashlib
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
_installed: set[str] = set()  # kinds of devices
CXX = "clang++-22"
_FLOAT, _HANDLE = 2, 3  # DLPack's type codes
# Every kernel of a module as a function that hands its number and arguments to Python.
_STUBS = """
#include <tvm/ffi/c_api.h>
#include <vector>
static int launch(int64_t number, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {{
  static TVMFFIObjectHandle function = nullptr;
  if (!function) {{
    TVMFFIByteArray name = {{"{launch}", {length}}};
    if (TVMFFIFunctionGetGlobal(&name, &function)) return -1;
  }}
  std::vector<TVMFFIAny> all(count + 1);
  all[0].type_index = kTVMFFIInt;
  all[0].zero_padding = 0;
  all[0].v_int64 = number;
  for (int32_t i = 0; i < count; i++) all[i + 1] = args[i];
  return TVMFFIFunctionCall(function, all.data(), count + 1, result);
}}
"""
_STUB = """
extern "C" int __tvm_ffi_{symbol}(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {{
  return launch({number}, args, count, result);
}}
"""


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

    def is_buffer(self, argument: int) -> bool:
        """Whether an argument is memory of the device."""
        return self.arguments[argument][0] == _HANDLE


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


def read_module(data: bytes, whole: bool = False, named: bool = True) -> list[Kernel]:
    """Return the kernels of a serialised Metal, OpenCL or WebGPU module.

    Args:
        data: the module's bytes.
        whole: the module keeps one text for all kernels (OpenCL), not one each.
        named: the module begins with the name of its format (WebGPU's does not).
    """
    reader = _Reader(bytes(data))
    if named:
        reader.text()
    found = {}
    for _ in range(reader.count()):
        symbol, name = reader.text(), reader.text()
        arguments = tuple(reader.take("BBH")[:2] for _ in range(reader.count()))
        launch = tuple(reader.text() for _ in range(reader.count()))
        reader.take(f"{reader.count()}i")
        found[symbol] = (name, arguments, launch)
    if whole:
        sources = dict.fromkeys(found, reader.text())
    else:
        sources = {reader.text(): reader.text() for _ in range(reader.count())}
    return [Kernel(name, s, a, t, sources[s]) for s, (name, a, t) in found.items()]


@cache
def install_device(kind: str, directory: Path) -> None:
    """Give this process a device of ``kind``, for good; see ``gpu_device.cc``.

    It takes the place of the real one, which builds for CUDA load without a GPU.
    """
    name = f"device_api.{kind}"
    if kind in _installed:
        return
    if tvm_ffi.get_global_func(name, allow_missing=True) is not None:
        tvm_ffi.registry.remove_global_func(name)
    library = directory / f"{kind}_device.so"
    site = Path(tvm.__file__).parent
    ffi = Path(tvm_ffi.__file__).parent
    flags = [f'-DDEVICE_API="{name}"', f"-I{site / 'include'}"]
    compile_library([*flags, f"-I{ffi / 'include'}"], HERE / "gpu_device.cc", library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _installed.add(kind)


def is_simulated(kind: str) -> bool:
    """Whether this process was given a device of ``kind``; see `install_device`."""
    return kind in _installed


def compile_library(flags: list[str], source: Path, library: Path) -> None:
    """Compile C++ to a shared library, unless it is there."""
    if not library.exists():
        command = [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", *flags]
        subprocess.run([*command, "-o", str(library), str(source)], check=True)


def calling_python(
    kernels: list[Kernel], first: int, launch: str, directory: Path, others: str = ""
) -> Any:
    """Return a module whose kernels call the global function ``launch``.

    It gets the kernel's number, counted from ``first`` on, and its arguments. ``others`` is C++ for
    what a module has beside kernels.
    """
    stubs = (_STUB.format(symbol=k.symbol, number=first + i) for i, k in enumerate(kernels))
    code = _STUBS.format(launch=launch, length=len(launch)) + "".join(stubs) + others
    source = directory / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.cc"
    source.write_text(code)
    include = Path(tvm_ffi.__file__).parent / "include"
    compile_library([f"-I{include}"], source, source.with_suffix(".so"))
    return tvm_ffi.load_module(str(source.with_suffix(".so")))


def on_load(kind: str, load: Callable[[bytes], Any]) -> None:
    """Open the device modules of libraries with ``load``."""
    tvm_ffi.register_global_func(f"ffi.Module.load_from_bytes.{kind}", load, override=True)
