"""Making the generator TVM's own: ``target.build.vulkan`` and what goes with it."""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
import tvm_ffi

from fairy_compile import errors
from fairy_compile.codegen.spirv.intrinsics import register_lowering_rules
from fairy_compile.codegen.spirv.kernel import compile_module
from fairy_compile.codegen.spirv.saved_module import device_module

BUILD_FUNCTION = "target.build.vulkan"


@cache
def register() -> bool:
    """Make ``tvm.compile`` and ``relax.build`` able to build for target kind ``vulkan``.

    A TVM build with a generator of its own keeps it. Worker processes of a tuner each have to call
    this for themselves.

    Returns:
        Whether the generator of this package is the one in use.
    """
    if tvm.get_global_func(BUILD_FUNCTION, allow_missing=True) is not None:
        return False
    # Errors cross TVM by the name of their class and come back as that class.
    for error in (errors.FairyError, errors.UnsupportedError):
        tvm_ffi.register_error(error.__name__, error)
    register_lowering_rules()

    @tvm_ffi.register_global_func(BUILD_FUNCTION)
    def build(module: tvm.IRModule, target: Any) -> Any:
        return device_module(compile_module(module, target))

    return True
