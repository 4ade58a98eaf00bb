"""Device modules for a TVM build: launchable where it has a Vulkan runtime, else saveable only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tvm

from fairy_compile.codegen.spirv.kernel import Kernel
from fairy_compile.codegen.spirv.serialize import MODULE_KIND, module_bytes
from fairy_compile.errors import FairyError

_SOURCE = Path(__file__).with_name("saved_module.cc")
_LOADER = f"ffi.Module.load_from_bytes.{MODULE_KIND}"


def runtime_present() -> bool:
    """Tell whether this TVM build can launch Vulkan kernels."""
    return tvm.get_global_func(_LOADER, allow_missing=True) is not None


def device_module(kernels: Sequence[Kernel]) -> Any:
    """Return a TVM module of the kernels, to be imported by a host module and exported with it.

    Raises:
        FairyError: the TVM build has no Vulkan runtime, and the class that stands in for it could
            not be compiled.
    """
    data = module_bytes(kernels)
    if runtime_present():
        return tvm.get_global_func(_LOADER)(data)
    return _saved_module_library()["make_saved_module"](
        MODULE_KIND, data, [kernel.name for kernel in kernels]
    )


@cache
def _saved_module_library() -> Any:
    """Compile ``saved_module.cc``, or find it compiled in the user's cache of tvm-ffi."""
    import tvm_ffi.cpp

    try:
        return tvm_ffi.cpp.load_inline(
            "fairy_compile_saved_module",
            cpp_sources=_SOURCE.read_text("utf-8"),
            functions="make_saved_module",
        )
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise FairyError(
            "a Vulkan library needs a C++ compiler and ninja on this machine, once, to build a "
            f"small module class, and that failed: {lines[-1]}; install a compiler (c++ on the "
            "path, or set CXX), and ninja with: pip install ninja"
        ) from error
