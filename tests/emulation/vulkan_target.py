"""Targets for tests of Vulkan code: everything that lavapipe can do, and how to build for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm

from fairy_compile.codegen import spirv
from tests.emulation import vulkan_runtime
from tests.emulation.spirv_val import validate
from tests.emulation.vulkan_module import ShaderKernel, kernels_of

EVERYTHING = {
    "kind": "vulkan",
    "max_num_threads": 1024,
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 32768,
    "supports_float16": True,
    "supports_float64": True,
    "supports_int8": True,
    "supports_int16": True,
    "supports_int64": True,
    "supports_8bit_buffer": True,
    "supports_16bit_buffer": True,
    "supports_integer_dot_product": True,
}

# Host code only checks and passes arguments: compile it fast.
HOST = {"kind": "llvm", "opt-level": 0}

SUBGROUPS = {"max_spirv_version": 0x10300, "supported_subgroup_operations": 0x7F}


def vulkan_target(**changes: Any) -> tvm.target.Target:
    """Return a target with everything, except for the given attributes; None removes one."""
    attributes = {k: v for k, v in (EVERYTHING | changes).items() if v is not None}
    return tvm.target.Target(attributes, host=HOST)


def build(function: Any, **changes: Any) -> tuple[Any, dict[str, ShaderKernel]]:
    """Compile a function or module for Vulkan; return it and its validated kernels by name."""
    spirv.register()
    executable = tvm.compile(function, target=vulkan_target(**changes))
    kernels = kernels_of(executable)
    for kernel in kernels.values():
        validate(kernel.code)
    return executable, kernels


def run(function: Any, arrays: Sequence[np.ndarray], **changes: Any) -> list[np.ndarray]:
    """Compile a function, run it on lavapipe, and return its arguments afterwards."""
    vulkan_runtime.install()
    executable, _ = build(function, **changes)
    tensors = [tvm.runtime.tensor(array, device=tvm.vulkan()) for array in arrays]
    executable(*tensors)
    return [tensor.numpy() for tensor in tensors]
