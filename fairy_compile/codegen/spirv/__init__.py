"""SPIR-V code generator for Vulkan, in Python, for TVM builds that lack one.

A lowered TIR function becomes a SPIR-V module in one pass, file by file:

- ``kernel``: a function, its arguments and limits; `compile_module` is the entry.
- ``statements``, ``expressions``, ``calls``: the classes of TIR nodes and operators.
- ``memory``: buffers, shared arrays, scalar arguments.
- ``values``: arithmetic on vectors of any width.
- ``function``: blocks, control flow, reuse of equal instructions.
- ``module``: sections, types, constants; ``enums``: the specification's numbers.
- ``target``: capabilities and limits, from the attributes of a TVM target.
- ``serialize``, ``saved_module``, ``register``, ``intrinsics``: how TVM gets it.
"""

from fairy_compile.codegen.spirv.kernel import Kernel, compile_function, compile_module
from fairy_compile.codegen.spirv.register import register
from fairy_compile.codegen.spirv.saved_module import runtime_present
from fairy_compile.codegen.spirv.serialize import module_bytes

__all__ = [
    "Kernel",
    "compile_function",
    "compile_module",
    "module_bytes",
    "register",
    "runtime_present",
]
