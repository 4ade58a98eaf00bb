"""Libraries of TVM's runtime that are opened where its compiler is not."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
from fairy_compile.runtime.library import open_device
device = open_device("cpu")
import tvm.base
print(tvm.base._RUNTIME_ONLY, bool(device.exist))
print("tvm_runtime_extra" in open("/proc/self/maps").read())
"""


def test_the_runtime_alone_opens_what_belongs_to_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "True", "True"]
