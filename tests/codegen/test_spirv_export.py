"""Vulkan modules where TVM has no Vulkan runtime: exported, inspected, refused at launch.

In a process of its own, since other tests give this one a Vulkan runtime.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import numpy as np, tvm
from tvm.script import tirx as T
from fairy_compile.codegen import spirv

@T.prim_func(s_tir=True)
def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
    for j in T.thread_binding(64, "threadIdx.x"):
        y[j] = x[j] * T.float32(2)

assert spirv.register() and spirv.register()
assert not spirv.runtime_present()
executable = tvm.compile(double, target=tvm.target.Target("vulkan", host="llvm"))
(module,) = executable.mod.imports
assert module.kind == "vulkan"
"""


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    file = folder / "program.py"  # TVMScript reads its source from a file
    file.write_text(PROGRAM + textwrap.dedent(program), "utf-8")
    return subprocess.run(
        [sys.executable, str(file), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("suffix", ["so", "tar"])
def test_exported_library_holds_the_module(tmp_path, suffix):
    file = tmp_path / f"double.{suffix}"
    done = run(tmp_path, "import sys; executable.export_library(sys.argv[1])", str(file))
    assert done.returncode == 0, done.stderr
    data = file.read_bytes()
    if suffix == "tar":
        with tarfile.open(file) as members:
            data = b"".join(members.extractfile(member).read() for member in members)
    assert b"double_kernel" in data
    assert (0x07230203).to_bytes(4, "little") in data


def test_launch_says_what_is_missing(tmp_path):
    done = run(
        tmp_path,
        """
        kernel = module["double_kernel"]
        assert not module.implements_function("another")
        try:
            kernel(0, 0)
        except RuntimeError as error:
            print(error)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "double_kernel cannot be launched: this TVM build has no 'vulkan' runtime" in done.stdout
    assert "MLC runtime" in done.stdout


def test_running_an_artifact_says_what_is_missing(tmp_path):
    done = run(
        tmp_path,
        """
        from fairy_compile.errors import UnsupportedError
        from fairy_compile.runtime.library import open_device
        try:
            open_device("vulkan")
        except UnsupportedError as error:
            print(error)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "no device 'vulkan'" in done.stdout
    assert "has no Vulkan runtime" in done.stdout
    assert "MLC runtime" in done.stdout
    assert "USE_VULKAN=ON" in done.stdout


def test_no_compiler_is_told_with_what_to_install(tmp_path):
    done = run(
        tmp_path,
        """
        import os, sys, tvm
        from fairy_compile.errors import FairyError
        from fairy_compile.codegen.spirv import saved_module
        saved_module._saved_module_library.cache_clear()
        os.environ["TVM_FFI_CACHE_DIR"] = sys.argv[1]
        os.environ["CXX"] = "no-such-compiler"
        try:
            tvm.compile(double, target=tvm.target.Target("vulkan", host="llvm"))
        except FairyError as error:
            print("told:", error)
        """,
        str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert "told: a Vulkan library needs a C++ compiler and ninja" in done.stdout
    assert "pip install ninja" in done.stdout
