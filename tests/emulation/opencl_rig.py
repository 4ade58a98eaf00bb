"""An OpenCL device for TVM on PoCL: the wheel compiles OpenCL sources, but has no OpenCL runtime.

Device memory is host memory, which PoCL's CPU device works on in place (shared virtual memory).
PoCL of Debian has no 16-bit floats: kernels with them are compiled by clang instead of being run.

PoCL 3.1 miscompiles one of TVM's kernels when it optimises: prefill over new keys with heads of 32
elements in float32 takes values of keys past the end of a sequence whose length is no multiple of
16. Without optimisation it is right, and the same source is right, free of races and of reads of
uninitialised memory in oclgrind. So attention runs without optimisation here.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from tests.emulation.gpu_modules import (
    CXX,
    Kernel,
    calling_python,
    install_device,
    on_load,
    read_module,
)

_LAUNCH = "fairy_compile_tests.opencl_launch"
# TVM's OpenCL modules give out what they compiled and take it back, which MLC's engine asks for.
_PROGRAMS = """
extern "C" int get_programs(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result)
    asm("__tvm_ffi_opencl.GetPreCompiledPrograms");
extern "C" int get_programs(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) {
  TVMFFIByteArray none = {"", 0};
  return TVMFFIStringFromByteArray(&none, result);
}
extern "C" int set_programs(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result)
    asm("__tvm_ffi_opencl.SetPreCompiledPrograms");
extern "C" int set_programs(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) { return 0; }
"""


def missing_tools() -> str | None:
    """Return what to install to run these tests, or None."""
    if not shutil.which(CXX):
        return "needs the Debian package clang-22"
    try:
        import pyopencl
    except ImportError:
        return "needs the package pyopencl"
    try:
        platforms = pyopencl.get_platforms()
    except pyopencl.LogicError:
        platforms = []
    if not any("Portable" in platform.name for platform in platforms):
        return "needs the Debian package pocl-opencl-icd"
    return None


class OpenCLRig:
    """The device of a test session.

    Args:
        directory: for what is compiled.
        optimize: see below.

    Attributes:
        optimize: whether PoCL optimises the kernels of libraries it loads.
        kernels: of the library loaded last.
        launches: name of every kernel that ran.
    """

    def __init__(self, directory: Path, optimize: bool = True) -> None:
        import pyopencl

        os.environ.setdefault("PYOPENCL_NO_CACHE", "1")
        self.directory = directory
        self.optimize = optimize
        platform = next(p for p in pyopencl.get_platforms() if "Portable" in p.name)
        self.context = pyopencl.Context(platform.get_devices()[:1])
        self.queue = pyopencl.CommandQueue(self.context)
        self.kernels: list[Kernel] = []
        self.programs: list[Any] = []
        self.launches: list[str] = []
        install_device("opencl", directory)
        on_load("opencl", self.load)
        tvm_ffi.register_global_func(_LAUNCH, self.launch, override=True)

    def load(self, data: bytes) -> Any:
        """Compile a device module and return what runs it."""
        import pyopencl

        first = len(self.programs)
        self.kernels = read_module(data, whole=True)
        program = pyopencl.Program(self.context, self.kernels[0].source)
        program = program.build(options=[] if self.optimize else ["-cl-opt-disable"])
        self.programs += [(kernel, getattr(program, kernel.name)) for kernel in self.kernels]
        return calling_python(self.kernels, first, _LAUNCH, self.directory, _PROGRAMS)

    def launch(self, number: int, *args: Any) -> None:
        """Run one kernel and wait for it."""
        import pyopencl

        kernel, program = self.programs[number]
        given = len(kernel.arguments)
        for i, ((_, bits), value) in enumerate(zip(kernel.arguments, args, strict=False)):
            if kernel.is_buffer(i):
                program.set_arg(i, _memory(value))
            elif kernel.is_float(i):
                program.set_arg(i, np.float32(value))
            else:
                program.set_arg(i, {32: np.int32, 64: np.int64}[bits](value))
        groups, threads = [1, 1, 1], [1, 1, 1]
        for tag, extent in zip(kernel.launch, args[given:], strict=False):
            sizes = groups if tag.startswith("block") else threads
            sizes["xyz".index(tag[-1])] = max(1, int(extent))  # as TVM's runtimes do
        total = [g * t for g, t in zip(groups, threads, strict=True)]
        self.launches.append(kernel.name)
        pyopencl.enqueue_nd_range_kernel(self.queue, program, total, threads).wait()


def _memory(pointer: Any) -> Any:
    """Return memory of the host as a kernel's argument; only its address counts."""
    import pyopencl

    byte = (ctypes.c_uint8 * 1).from_address(int(getattr(pointer, "value", pointer)))
    return pyopencl.SVM(np.ctypeslib.as_array(byte))


def compile_with_clang(source: str, directory: Path) -> None:
    """Compile OpenCL C to SPIR's LLVM IR; raises where clang finds an error."""
    file = directory / "kernels.cl"
    file.write_text(source)
    command = [
        CXX.replace("++", ""), "-x", "cl", "-cl-std=CL2.0", "-target", "spir64", "-Xclang",
        "-finclude-default-header", "-emit-llvm", "-c", "-o", os.devnull, str(file),
    ]  # fmt: skip
    subprocess.run(command, check=True)
