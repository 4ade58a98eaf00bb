"""The C++ headers that stand in for those the TVM wheels lack, compiled for this machine."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
import tvm_ffi

import fairy_compile

SOURCE = Path(__file__).with_name("wasm_headers.cc")
INCLUDE = Path(fairy_compile.__file__).parent / "codegen" / "wasm" / "include"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_streams_write_what_they_read(tmp_path: Path) -> None:
    wheel = Path(tvm_ffi.__file__).parent
    includes = [INCLUDE, wheel / "include", wheel / "3rdparty" / "dlpack" / "include"]
    program = tmp_path / "headers"
    subprocess.run(
        [
            "c++", "-std=c++17", *(f"-I{path}" for path in includes), "-o", str(program),
            str(SOURCE), f"-L{wheel / 'lib'}", "-ltvm_ffi", f"-Wl,-rpath,{wheel / 'lib'}",
        ],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    want = [
        base64.b64encode(bytes(251 - 40 * i for i in range(size))).decode() for size in range(8)
    ]
    assert done.stdout.splitlines() == want
