"""A simulated Metal device: TVM's Metal source compiled as C++ and run with Metal's threads.

Libraries built for target ``metal`` with a Linux host run as they are, on `tvm.metal()`. This shows
that results are right whatever order threads run in, and that barriers are where they must be. It
says nothing about speed, nor about what Apple's compiler would refuse.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import tvm_ffi

from tests.emulation.gpu_modules import (
    CXX,
    HERE,
    Kernel,
    compile_library,
    install_device,
    on_load,
    read_module,
)

_THREADGROUP_BYTES = 32768
_SIZES = {"half": 2, "float": 4, "int": 4, "uint": 4, "uchar": 1, "bool": 1, "char": 1}
_SHARED = re.compile(r"^(\s*)threadgroup (?!_)(\w+) (\w+)\[(\d+)\];", re.MULTILINE)
_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_SIGNATURE = re.compile(r"kernel void (\w+)\((.*?)\) \{", re.DOTALL)
_FLAGS = (
    "-Wno-unknown-attributes",
    "-Xclang", "-ffloat16-excess-precision=none", "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern", "-fsanitize=bounds,alignment,shift-exponent",
    "-fsanitize-trap=all",
)  # fmt: skip


def missing_tools() -> str | None:
    """Return what to install to run these tests, or None."""
    return None if shutil.which(CXX) else "needs the Debian package clang-22"


class MetalRig:
    """The simulated device of a test session.

    Attributes:
        order: the order threads run in: 0 by number, 1 backwards, others shuffled by that seed.
        edit: applied to every kernel's source before it is compiled.
        kernels: of the library loaded last.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.order = 0
        self.edit = lambda source: source
        self.kernels: list[Kernel] = []
        install_device("metal", directory)
        on_load("metal", self.load)

    def load(self, data: bytes) -> Any:
        """Compile a device module and return what runs it."""
        self.kernels = read_module(data)
        parts = ['#include "metal_shim.h"']
        for number, kernel in enumerate(self.kernels):
            parts.append(self._kernel(number, kernel))
        code = "\n".join(parts)
        name = hashlib.sha256(f"{self.order}{code}".encode()).hexdigest()[:16]
        library = self.directory / f"{name}.so"
        source = library.with_suffix(".cc")
        source.write_text(code)
        compile_library([*_FLAGS, f"-DORDER={self.order}", f"-I{HERE}"], source, library)
        return tvm_ffi.load_module(str(library))

    def _kernel(self, number: int, kernel: Kernel) -> str:
        check_threadgroup_memory(kernel)
        check_buffers(kernel)
        source = translate(self.edit(kernel.source))
        ((name, signature),) = _SIGNATURE.findall(kernel.source)
        buffers, call = 0, []
        for parameter in signature.split(",\n"):
            parameter = parameter.strip()
            binding = re.search(r"\[\[ *buffer\((\d+)\) *\]\]", parameter)
            kind = parameter.split("[[")[0].strip().rpartition(" ")[0]
            if binding and kind.endswith("&"):
                call.append(f"*({kind[:-1]}*)values")
            elif binding:
                call.append(f"({kind})launching::buffers[{binding[1]}]")
                buffers += 1
            elif "threadgroup_position_in_grid" in parameter:
                call.append(f"launching::index<{kind}>(launching::group)")
            else:
                call.append(f"launching::index<{kind}>(launching::thread_at(number))")
        given = len(kernel.arguments)
        store = "".join(
            f"values[{i - buffers}].real[0] = (float)args[{i}].real;"
            if kernel.is_float(i)
            else f"values[{i - buffers}].integer = args[{i}].integer;"
            for i in range(buffers, given)
        )
        # TVM's runtimes launch one where a size is zero.
        sizes = "".join(
            f"sizes[{_place(tag)}] = std::max(1u, (uint)args[{given + i}].integer);"
            for i, tag in enumerate(kernel.launch)
            if "Idx" in tag
        )
        return f"""
namespace kernel{number} {{
using namespace metal;
{source}
static union {{ int64_t integer; float real[2]; }} values[{max(1, given - buffers)}];
static void body(uint number) {{ {name}({", ".join(call)}); }}
}}
extern "C" int __tvm_ffi_{kernel.symbol}(void*, const FfiAny* args, int, FfiAny*) {{
  using namespace kernel{number};
  void* pointers[32];
  for (int i = 0; i < {buffers}; i++) pointers[i] = args[i].pointer;
  launching::buffers = pointers;
  uint sizes[6] = {{1, 1, 1, 1, 1, 1}};
  {store}
  {sizes}
  return launching::run(body, sizes, "{name}", ORDER);
}}"""


def _place(tag: str) -> int:
    """Return where `launching::run` wants an extent: groups x, y, z, then threads."""
    return {"b": 0, "t": 3}[tag[0]] + "xyz".index(tag[-1])


def translate(source: str) -> str:
    """Rewrite what C++ cannot be taught by a header."""
    source = source.replace("#include <metal_stdlib>", "").replace("using namespace metal;", "")
    source = _SHARED.sub(
        r'\1static __attribute__((section("tgmem"), aligned(16))) \2 \3[\4];', source
    )
    source = re.sub(
        r"\bmake_filled_simdgroup_matrix<(\w+), (\d+), (\d+)>\(([^;]*)\);",
        r"matrix_fill<\1, \2, \3>((\1)(\4), __LINE__);",
        source,
    )
    return re.sub(r"(?<![\w.])(\d+\.\d*(?:e[+-]?\d+)?)h\b", r"((half)\1f)", source)


def check_buffers(kernel: Kernel) -> None:
    """Refuse buffers without a name: registers that TVM moved to memory which all threads share.

    Groups of threads run one after the other here, and would not overwrite each other's.
    """
    found = re.findall(r"device \w+\* (_ptr\w*) \[\[", kernel.source)
    assert not found, f"{kernel.name} has registers in device memory: {', '.join(found)}"


def check_threadgroup_memory(kernel: Kernel) -> None:
    """Raise if a kernel wants more memory than an Apple GPU's threadgroup has."""
    used = sum(_bytes_of(t) * int(n) for _, t, _, n in _SHARED.findall(kernel.source))
    assert used <= _THREADGROUP_BYTES, f"{kernel.name} takes {used} bytes of threadgroup memory"


def _bytes_of(name: str) -> int:
    """Return the size of a type, e.g. ``half4``; vectors of three take the place of four."""
    scalar = name.rstrip("234")
    lanes = int(name.removeprefix(scalar) or 1)
    return _SIZES[scalar] * (4 if lanes == 3 else lanes)


def barriers(source: str) -> int:
    """Return the number of barriers in a kernel's source."""
    return source.count(_BARRIER)


def without_barrier(source: str, number: int) -> str:
    """Return a kernel's source without its barrier of that number."""
    pieces = source.split(_BARRIER)
    if number >= len(pieces) - 1:
        return source
    return _BARRIER.join(pieces[: number + 1]) + ";" + _BARRIER.join(pieces[number + 1 :])
