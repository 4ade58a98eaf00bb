"""Running ARM kernels on this machine: cross-compile, link with `run_kernel.c`, emulate with QEMU.

Emulation shows that results are right and that a CPU has the instructions. It says nothing about
speed.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.targets import Target

_COMPILER, _EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
_PACKAGES = {_COMPILER: "gcc-aarch64-linux-gnu", _EMULATOR: "qemu-user-static"}
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's
_SCALAR_CODES = {int: 100, float: 101}  # of run_kernel.c


@dataclass(frozen=True)
class Machine:
    """An instruction set as a compilation target, and the CPU that QEMU shows for it."""

    isa: str
    features: tuple[str, ...]
    cpu: str

    def target(self) -> Target:
        """Return the compilation target."""
        tvm_target = {
            "kind": "llvm",
            "mtriple": "aarch64-unknown-linux-gnu",
            "mattr": [f"+{feature}" for feature in self.features],
        }
        return Target(self.isa, "", tvm_target, frozenset(self.features), ("arm.codebook",))


MACHINES = (
    Machine("neon", ("neon",), "cortex-a72"),
    Machine("dotprod", ("neon", "dotprod"), "cortex-a76"),
    Machine("i8mm", ("neon", "dotprod", "i8mm"), "max"),
)


class IllegalInstruction(Exception):
    """The emulated CPU lacks an instruction of the program."""


def missing_tools() -> str | None:
    """Return what to install to run these tests, or None."""
    packages = [package for tool, package in _PACKAGES.items() if shutil.which(tool) is None]
    return f"needs the Debian packages {' '.join(packages)}" if packages else None


def compile_kernel(function: Any, target: Target, directory: Path) -> Path:
    """Compile and link a PrimFunc into a program for `run`; returns the program's path."""
    import tvm
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    name = str(function.attrs["global_symbol"])
    library = tvm.compile(function, target=target.to_tvm())
    kernel, program = directory / f"{name}.o", directory / name
    library.mod.write_to_file(str(kernel), "o")
    includes = [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    source = str(Path(__file__).with_name("run_kernel.c"))
    command = [_COMPILER, "-O1", "-Wall", "-Wextra", "-Werror", "-static", *includes]
    command += [f"-DKERNEL=__tvm_ffi_{name}", source, str(kernel), "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(program: Path, cpu: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Call a kernel with ``arrays`` on an emulated CPU; returns the last array, its output.

    Raises:
        IllegalInstruction: the CPU lacks an instruction.
    """
    return call(program, cpu, arrays)[-1]


def call(
    program: Path, cpu: str, arguments: Sequence[np.ndarray | int | float]
) -> list[np.ndarray]:
    """Call a kernel on an emulated CPU; returns its arrays as it left them, without the scalars.

    Raises:
        IllegalInstruction: the CPU lacks an instruction.
    """
    done = subprocess.run(
        [_EMULATOR, "-cpu", cpu, str(program)],
        input=b"".join([np.int64(len(arguments)).tobytes(), *map(_serialize, arguments)]),
        capture_output=True,
        check=False,
    )
    if done.returncode in (-signal.SIGILL, 128 + signal.SIGILL):
        raise IllegalInstruction(f"{program.name} on {cpu}")
    assert done.returncode == 0, f"{program.name}: status {done.returncode}: {done.stderr.decode()}"
    left, first = [], 0
    for array in (a for a in arguments if isinstance(a, np.ndarray)):
        data = done.stdout[first : first + array.nbytes]
        left.append(np.frombuffer(data, array.dtype).reshape(array.shape))
        first += array.nbytes
    assert first == len(done.stdout)
    return left


def _serialize(array: np.ndarray | int | float) -> bytes:
    if isinstance(array, int | float):
        value = np.int64(array) if isinstance(array, int) else np.float64(array)
        return np.int64(_SCALAR_CODES[type(array)]).tobytes() + value.tobytes()
    header = [_DTYPE_CODES[array.dtype.kind], array.dtype.itemsize * 8, array.ndim, *array.shape]
    return np.array(header, np.int64).tobytes() + np.ascontiguousarray(array).tobytes()
