"""TVM's runtime as WebAssembly objects, compiled once into the user's cache.

The sources are those of the installed wheels of apache-tvm and apache-tvm-ffi. Headers that the
wheels lack, and replacements for what a browser does not have, are in ``include/``; ``browser.cc``
is the C interface JavaScript calls. The compiler is zig, for it brings a C++ library along.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from fairy_compile.codegen.zig import zig_command
from fairy_compile.errors import FairyError
from fairy_compile.tvm_pair import TVM_PAIR
from fairy_compile.user_cache import cache_directory

TARGET = ("-target", "wasm32-wasi")
OBJECTS = ("browser.o", "wasm_runtime.o", "webgpu_runtime.o")

_HERE = Path(__file__).parent
_FLAGS = (
    *TARGET,
    "-std=c++17",
    "-O2",
    "-g0",
    # The runtime's sources know browsers by Emscripten's macro.
    "-D__EMSCRIPTEN__",
    "-DTVM_FFI_LITTLE_ENDIAN=1",
    "-DTVM_FFI_USE_LIBBACKTRACE=0",
    # WebAssembly without exception handling, which not every browser has: a throw aborts.
    "-Xclang",
    "-fignore-exceptions",
    "-Wno-ignored-attributes",
    "-include",
    "single_thread.h",
)
# Included by TVM's `wasm_runtime.cc`, but not called by a model: remote procedure calls, host sorts
# and self-tests.
_LEFT_OUT = re.compile(r"^src/runtime/(rpc|extra/contrib/sort)/|/testing/")
_FFI_PREFIX = "3rdparty/tvm-ffi/"


def find_zig() -> list[str]:
    """Return the command that runs zig.

    Raises:
        FairyError: it is not installed.
    """
    command = zig_command()
    if command is None:
        raise FairyError(
            "a library for browsers needs zig to compile TVM's runtime, and it is not installed; "
            'run pip install "fairy-compile[web]"'
        )
    return command


def runtime_is_built() -> bool:
    """Tell whether the cache has the runtime's objects."""
    return _directory(find_zig()).is_dir()


def build_runtime() -> list[Path]:
    """Return the objects of TVM's runtime, compiling them if the cache has none of this version.

    Raises:
        FairyError: there is no zig, or compiling failed.
    """
    zig = find_zig()
    directory = _directory(zig)
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".new-") as new:
            _compile(zig, Path(new))
            try:
                os.replace(Path(new) / "objects", directory)
            except OSError:  # another process was faster
                if not directory.is_dir():
                    raise
    return [directory / name for name in OBJECTS]


def _directory(zig: list[str]) -> Path:
    return cache_directory() / "wasm" / _key(tuple(zig))


@cache
def _key(zig: tuple[str, ...]) -> str:
    """Return what identifies the objects: versions, flags and our own sources."""
    version = subprocess.run([*zig, "version"], capture_output=True, text=True, check=False)
    if version.returncode:
        raise FairyError(f"zig does not run: {' '.join(zig)} version: {_last_line(version.stderr)}")
    digest = hashlib.sha256(repr((version.stdout.strip(), TVM_PAIR, _FLAGS)).encode())
    for path in sorted(p for p in _HERE.rglob("*") if p.suffix in (".h", ".cc")):
        digest.update(path.relative_to(_HERE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(zig: list[str], directory: Path) -> None:
    tvm_wheel, ffi_wheel = _wheels()
    stage, objects = directory / "include", directory / "objects"
    objects.mkdir()
    _stage(stage, tvm_wheel, ffi_wheel)
    includes = (
        stage,
        # TVM's sources name headers that are not in the wheel by paths relative to themselves.
        stage / "src" / "runtime",
        stage / "src" / "runtime" / "vm",
        tvm_wheel,
        tvm_wheel / "include",
        ffi_wheel / "include",
        ffi_wheel / "3rdparty" / "dlpack" / "include",
    )
    emcc = tvm_wheel / "web" / "emcc"
    sources = (_HERE / "browser.cc", emcc / "wasm_runtime.cc", emcc / "webgpu_runtime.cc")

    def compile_one(source: Path, name: str) -> None:
        flags = [*_FLAGS, *(part for path in includes for part in ("-I", str(path)))]
        run_zig([*zig, "c++", *flags, "-c", str(source), "-o", str(objects / name)])

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, sources, OBJECTS))


def _stage(stage: Path, tvm_wheel: Path, ffi_wheel: Path) -> None:
    """Lay out the headers that come before the wheels' own."""
    shutil.copytree(_HERE / "include", stage)
    (stage / "src" / "runtime" / "vm").mkdir(parents=True)
    text = (tvm_wheel / "web" / "emcc" / "wasm_runtime.cc").read_text("utf-8")
    for name in re.findall(r'#include "((?:src|3rdparty)/[^"]+)"', text):
        path = stage / name
        if _LEFT_OUT.search(name):
            content = ""
        elif name.startswith(_FFI_PREFIX):  # where TVM's repository keeps what is a wheel here
            content = f'#include "{(ffi_wheel / name.removeprefix(_FFI_PREFIX)).as_posix()}"\n'
        else:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")


def _wheels() -> tuple[Path, Path]:
    import tvm
    import tvm_ffi

    wheels = Path(tvm.__file__).parent, Path(tvm_ffi.__file__).parent
    for path in (wheels[0] / "web/emcc/wasm_runtime.cc", wheels[1] / "src/ffi/object.cc"):
        if not path.is_file():
            raise FairyError(
                f"this installation of TVM lacks {path}, a source of the runtime for browsers; "
                "install the wheels: pip install --force-reinstall "
                + " ".join(f"{name}=={version}" for name, version in TVM_PAIR.items())
            )
    return wheels


def run_zig(command: list[str]) -> None:
    """Run a zig command.

    Raises:
        FairyError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        reason = errors[0] if errors else _last_line(done.stderr)
        raise FairyError(f"building the WebAssembly library failed: {reason}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
