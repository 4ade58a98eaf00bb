"""Machine code for CUDA libraries, on machines with and without a GPU.

Left alone, TVM writes CUDA *source* into a library unless its CUDA runtime is loaded, and the
machine that loads the library must then have a compiler. Here the runtime is loaded without a
driver, if need be over a stand-in for `libcuda.so.1` that has no functions but their names, and
TVM's compile callback is one that calls nvcc for every architecture of the target.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fairy_compile.cudart import load_cudart, load_first
from fairy_compile.errors import FairyError
from fairy_compile.targets import Target

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
_OPTIONS = ("-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr")
# What the codegen's preamble defines for half and bfloat16 needs the operators that these remove.
_OPERATORS = tuple(
    f"-U__CUDA_NO_{kind}__"
    for kind in (
        "HALF_OPERATORS",
        "HALF_CONVERSIONS",
        "BFLOAT16_OPERATORS",
        "BFLOAT16_CONVERSIONS",
        "BFLOAT162_OPERATORS",
        "BFLOAT162_CONVERSIONS",
    )
)
_PIP = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"
# What TVM's CUDA runtime takes from the driver; nothing calls them while compiling.
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)


def archs(target: Target) -> tuple[str, ...]:
    """Return the architectures that a library for ``target`` holds machine code of, oldest first.

    Raises:
        FairyError: the target names something that is no architecture.
    """
    named = tuple(target.extra.get("archs", DEFAULT_ARCHS))
    for arch in named:
        if not (arch.startswith("sm_") and arch[3:5].isdigit()):
            raise FairyError(
                f"target {target.name} has the CUDA architecture {arch!r}; allowed: sm_80 and "
                f"later, e.g. {', '.join(DEFAULT_ARCHS)}"
            )
    return tuple(sorted(named, key=lambda arch: int("".join(c for c in arch if c.isdigit()))))


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit: on PATH, in its folder, or from pip."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        folders += [*Path(root).glob("cu*/bin"), Path(root) / "cuda_nvcc" / "bin"]
    return next(
        (found for path in (None, *folders) if (found := shutil.which(name, path=path))), None
    )


def check_nvcc(target: Target) -> str:
    """Return the path of nvcc.

    Raises:
        FairyError: it is not installed; says what to install.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FairyError(
            f"target {target.name} is compiled by nvcc, which is not installed; install NVIDIA's "
            f"CUDA toolkit, 12.8 or later, or: {_PIP}"
        )
    return nvcc


def compile_fatbin(source: str, names: Sequence[str], nvcc: str) -> bytes:
    """Compile CUDA C++ for architectures, with PTX of the newest for later ones.

    Sources for variants alone (``sm_90a``) may use what only those have, so they get no PTX.

    Raises:
        FairyError: nvcc failed.
    """
    numbers = [arch[3:] for arch in names]
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    if any(number.isdigit() for number in numbers):
        newest = numbers[-1].rstrip("af")  # PTX of a variant such as 90a runs on that alone
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    with tempfile.TemporaryDirectory() as folder:
        written, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        written.write_text(source, "utf-8")
        command = [nvcc, "--fatbin", *_OPTIONS, *_OPERATORS, *codes, "-o", binary, written]
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            reason = (lines or done.stderr.strip().splitlines() or ["no message"])[0]
            raise FairyError(f"nvcc could not compile the kernels: {reason}")
        return binary.read_bytes()


@contextmanager
def machine_code(target: Target) -> Iterator[None]:
    """Within this context, TVM compiles CUDA modules to machine code for all architectures.

    Raises:
        FairyError: nvcc, a C compiler or the CUDA runtime is missing.
    """
    import tvm_ffi

    nvcc, names = check_nvcc(target), archs(target)
    _load_runtime()
    hook = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(hook, allow_missing=True)

    def compile_source(source: str) -> bytes:
        return compile_fatbin(source, names, nvcc)

    tvm_ffi.register_global_func(hook, compile_source, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(hook)
        else:
            tvm_ffi.register_global_func(hook, before, override=True)


@functools.cache
def _load_runtime() -> None:
    """Load TVM's CUDA runtime into this process."""
    import tvm_ffi

    if tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True):
        return
    if not load_first(["libcuda.so.1"]):
        ctypes.CDLL(str(_driver_stand_in()), ctypes.RTLD_GLOBAL)
    if not load_cudart():
        raise FairyError(
            "CUDA builds need libcudart.so.13, which is not installed; install NVIDIA's CUDA "
            "toolkit 13, or: pip install nvidia-cuda-runtime"
        )
    import tvm

    folder = Path(tvm.__file__).parent / "lib"
    if not load_first([str(folder / "libtvm_runtime_cuda.so")]):
        raise FairyError(
            "TVM's CUDA runtime (libtvm_runtime_cuda.so) could not be loaded; CUDA libraries can "
            f"be built on Linux with the apache-tvm wheel, this is {sys.platform}"
        )


def _driver_stand_in() -> Path:
    """Compile a `libcuda.so.1` of empty functions; it lives as long as this process."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise FairyError(
            "without an NVIDIA driver, CUDA builds need a C compiler (cc, gcc or clang), and none "
            "is installed; on Debian: apt-get install gcc"
        )
    folder = Path(tempfile.mkdtemp(prefix="fairy_compile-"))
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    lines = [f"int {name}(void) {{ return 100; }}" for name in _DRIVER_FUNCTIONS]  # no device
    source.write_text("\n".join(lines) + "\n", "utf-8")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library
