"""Parts of TVM's runtime that TVM opens by itself only beside its compiler.

Where the compiler is not installed, or ``TVM_USE_RUNTIME_LIB=1`` leaves it alone, ``import tvm``
loads ``libtvm_runtime`` and no more: no device but the CPU, and no KV cache.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fairy_compile.cudart import load_cudart, load_first


@cache
def load_sidecars() -> None:
    """Open TVM's runtime libraries that are installed and that TVM has not opened.

    One that cannot be opened, such as CUDA's on a machine without a driver, is left out: then its
    device does not exist, which `runtime.library.open_device` says.
    """
    import tvm
    from tvm.base import _RUNTIME_ONLY

    if not _RUNTIME_ONLY:
        return
    folder = Path(tvm.__file__).parent / "lib"
    for path in sorted(folder.glob("*tvm_runtime_*")):
        if path.suffix not in (".so", ".dylib", ".dll"):
            continue
        if path.stem.removeprefix("lib") == "tvm_runtime_cuda":
            load_cudart()  # the system's loader may not find it
        load_first([str(path)])
