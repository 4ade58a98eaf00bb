"""From a lowered device function to a SPIR-V kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm

from fairy_compile.codegen.spirv.dtypes import DType, dtype_of, is_pointer, parse_dtype
from fairy_compile.codegen.spirv.enums import Op
from fairy_compile.codegen.spirv.expressions import Expressions
from fairy_compile.codegen.spirv.function import FunctionBuilder
from fairy_compile.codegen.spirv.matrices import uses_matrices
from fairy_compile.codegen.spirv.memory import uses_uniform_buffer
from fairy_compile.codegen.spirv.module import ModuleBuilder
from fairy_compile.codegen.spirv.statements import Statements
from fairy_compile.codegen.spirv.target import KernelError, VulkanTarget

_DYNAMIC_SHARED_MEMORY = "tirx.use_dyn_shared_memory"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel with what a runtime needs to launch it.

    Attributes:
        name: of the entry point.
        code: the SPIR-V module, little endian.
        arguments: type of every argument in order; None for buffers, which come first.
        launch_tags: what the host passes after the arguments, e.g. ``blockIdx.x``.
        local_size: threads of a block along x, y, z.
        shared_bytes: shared memory of a block.
        uniform_buffer: whether scalars are passed in a uniform buffer, not as push constants.
    """

    name: str
    code: bytes
    arguments: tuple[DType | None, ...]
    launch_tags: tuple[str, ...]
    local_size: tuple[int, int, int]
    shared_bytes: int
    uniform_buffer: bool


def compile_module(module: tvm.IRModule, target: Any) -> list[Kernel]:
    """Compile all functions of a lowered device module.

    Args:
        module: functions with flat buffers, as TVM's pipeline hands them to ``target.build.*``.
        target: TVM target of kind ``vulkan``, or None for one with nothing optional.

    Raises:
        UnsupportedError: a function needs what the target or Vulkan lacks.
    """
    module = tvm.tirx.transform.PointerValueTypeRewrite()(module)
    vulkan = VulkanTarget(target)
    return [compile_function(function, vulkan) for function in module.functions.values()]


def compile_function(function: Any, target: VulkanTarget) -> Kernel:
    """Compile one lowered device function.

    Raises:
        UnsupportedError: it needs what the target or Vulkan lacks.
    """
    name = str(function.attrs["global_symbol"])
    error = KernelError(name)
    module = ModuleBuilder(target, error)
    if uses_matrices(function.body):
        module.use_vulkan_memory_model()
    builder = FunctionBuilder(module)
    expressions = Expressions(builder)
    arguments = _declare_arguments(function.params, expressions)
    statements = Statements(expressions)
    statements.run(function.body)
    builder.emit_void(Op.Return)

    local_size = (statements.local_size[0], statements.local_size[1], statements.local_size[2])
    shared_bytes = expressions.memory.shared_bytes
    target.check_sizes(local_size, shared_bytes, arguments.count(None), error)
    tags = tuple(str(tag) for tag in function.attrs.get("tirx.kernel_launch_params", []))
    if _DYNAMIC_SHARED_MEMORY in tags:
        raise error.unsupported("shared memory whose size is known only at launch")
    return Kernel(
        name=name,
        code=module.finish(name, local_size, builder.variables, builder.body),
        arguments=tuple(arguments),
        launch_tags=tags,
        local_size=local_size,
        shared_bytes=shared_bytes,
        uniform_buffer=uses_uniform_buffer(len(arguments) - arguments.count(None)),
    )


def _declare_arguments(params: Any, expressions: Expressions) -> list[DType | None]:
    """Declare buffers and scalars; return the arguments' types, None for buffers."""
    scalars = []
    arguments: list[DType | None] = []
    for param in params:
        if is_pointer(param):
            if scalars:
                raise expressions.error.unsupported(f"buffer {param.name} after scalar arguments")
            element = parse_dtype(str(param.ty.element_type.dtype))
            expressions.buffers[param] = expressions.memory.storage_buffer(
                param.name, element, binding=len(arguments)
            )
            arguments.append(None)
        else:
            scalars.append(param)
    if scalars:
        dtypes = [dtype_of(param) for param in scalars]
        values = expressions.memory.scalars(
            [param.name for param in scalars], dtypes, binding=len(arguments)
        )
        expressions.variables.update(zip(scalars, values, strict=True))
        arguments += dtypes
    return arguments
