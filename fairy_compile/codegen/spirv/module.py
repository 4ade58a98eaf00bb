"""A SPIR-V module under construction: ids, sections, types and constants.

The sections are those of the specification's "Logical Layout of a Module". Everything at module
scope is declared once: asking again for a type, a pointer or a constant returns the id it has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from fairy_compile.codegen.spirv.dtypes import UINT32, DType, Kind
from fairy_compile.codegen.spirv.enums import (
    GENERATOR,
    GLSL_STD_450,
    MAGIC_NUMBER,
    SPIRV_1_3,
    SPIRV_1_4,
    SPIRV_1_5,
    SPIRV_1_6,
    AddressingModel,
    Capability,
    CooperativeMatrixUse,
    Decoration,
    ExecutionMode,
    ExecutionModel,
    Extension,
    FunctionControl,
    MemoryModel,
    Op,
    Scope,
    StorageClass,
)
from fairy_compile.codegen.spirv.target import KernelError, VulkanTarget

WORD_MASK = 0xFFFFFFFF
Words = list[int]

# SPIR-V versions in whose core an extension is, where it need not be declared; None: in no one's.
_CORE_SINCE = {
    Extension.STORAGE_BUFFER: SPIRV_1_3,
    Extension.STORAGE_16BIT: SPIRV_1_3,
    Extension.STORAGE_8BIT: SPIRV_1_5,
    Extension.INTEGER_DOT_PRODUCT: SPIRV_1_6,
    Extension.VULKAN_MEMORY_MODEL: SPIRV_1_5,
    Extension.COOPERATIVE_MATRIX: None,
}


def append_instruction(section: Words, op: Op, *operands: int) -> None:
    """Append one instruction: word count and opcode share the first word."""
    section.append((len(operands) + 1) << 16 | op)
    section.extend(operand & WORD_MASK for operand in operands)


def string_words(text: str) -> list[int]:
    """Return a literal string: UTF-8, ended by zero, padded to whole words."""
    data = text.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))


class ModuleBuilder:
    """Collects a module with one entry point, and writes its words.

    Attributes:
        target: what the module may use.
        error: makes errors that name the kernel.
        memory_model: of the module.
    """

    def __init__(self, target: VulkanTarget, error: KernelError):
        self.target = target
        self.error = error
        self.memory_model = MemoryModel.GLSL450
        self._last_id = 0
        self._capabilities = {Capability.Shader}
        self._extensions: set[str] = set()
        self._names: Words = []
        self._decorations: Words = []
        self._globals: Words = []
        self._declared: dict[tuple, int] = {}
        self._variables: list[tuple[int, StorageClass]] = []
        self.glsl_import = self.new_id()
        self.use_extension(Extension.STORAGE_BUFFER)

    def new_id(self) -> int:
        """Return an unused id."""
        self._last_id += 1
        return self._last_id

    # ------------------------------------------------------------ capabilities

    def use_capability(self, capability: Capability) -> None:
        """Declare a capability."""
        self._capabilities.add(capability)

    def use_extension(self, name: str) -> None:
        """Declare an extension, unless it is part of the module's SPIR-V version."""
        since = _CORE_SINCE[name]
        if since is None or self.target.spirv_version < since:
            self._extensions.add(name)

    def use_vulkan_memory_model(self) -> None:
        """Choose Vulkan's memory model; call it before memory is accessed.

        Accesses of memory that threads share must then say so, see `Memory`, and barriers what they
        make available and visible.
        """
        self.memory_model = MemoryModel.Vulkan
        self.use_capability(Capability.VulkanMemoryModel)
        self.use_extension(Extension.VULKAN_MEMORY_MODEL)

    def use_arithmetic(self, dtype: DType) -> None:
        """Declare what values of ``dtype`` need to be more than loaded, stored and converted.

        Raises:
            UnsupportedError: the target lacks it.
        """
        capability = self.target.arithmetic(dtype, self.error)
        if capability is not None:
            self.use_capability(capability)

    def use_storage(self, dtype: DType) -> None:
        """Declare what storage buffers of ``dtype`` need.

        Raises:
            UnsupportedError: the target lacks it.
        """
        capability = self.target.storage(dtype, self.error)
        if capability is not None:
            self.use_capability(capability)
            self.use_extension(
                Extension.STORAGE_8BIT if dtype.bits == 8 else Extension.STORAGE_16BIT
            )

    # ------------------------------------------------------------------- types

    def _declare(self, op: Op, *operands: int) -> int:
        """Return the id of a type without decorations, declaring it the first time."""
        key = (op, *operands)
        if key not in self._declared:
            self._declared[key] = new = self.new_id()
            append_instruction(self._globals, op, new, *operands)
        return self._declared[key]

    def type(self, dtype: DType) -> int:
        """Return the id of a scalar, or of a vector of at most four lanes.

        Raises:
            UnsupportedError: a 64-bit type on a target without it.
        """
        if dtype in self._declared:
            return self._declared[dtype]
        if dtype.lanes > 1:
            declared = self._declare(Op.TypeVector, self.type(dtype.scalar), dtype.lanes)
        elif dtype.kind is Kind.BOOL:
            declared = self._declare(Op.TypeBool)
        else:
            if dtype.bits == 64:  # unlike narrow types, these exist only with their capability
                self.use_arithmetic(dtype)
            if dtype.kind is Kind.FLOAT:
                declared = self._declare(Op.TypeFloat, dtype.bits)
            else:
                declared = self._declare(Op.TypeInt, dtype.bits, int(dtype.kind is Kind.INT))
        self._declared[dtype] = declared
        return declared

    def pointer_type(self, storage_class: StorageClass, pointee: int) -> int:
        """Return the id of a pointer to the type ``pointee``."""
        return self._declare(Op.TypePointer, storage_class, pointee)

    def cooperative_matrix_type(
        self, component: DType, rows: int, columns: int, use: CooperativeMatrixUse
    ) -> int:
        """Return the id of a matrix that the threads of a subgroup hold together."""
        shape = [self.constant(n, UINT32) for n in (Scope.Subgroup, rows, columns, use)]
        return self._declare(Op.TypeCooperativeMatrixKHR, self.type(component), *shape)

    def array_type(self, element: int, length: int) -> int:
        """Return the id of an array of constant length, without a layout in memory."""
        return self._declare(Op.TypeArray, element, self.constant(length, UINT32))

    def block_type(
        self, members: Sequence[int], offsets: Sequence[int], array_stride: int | None = None
    ) -> int:
        """Declare a struct with a layout in memory, for buffers and push constants.

        Args:
            members: types of the members.
            offsets: their offsets in bytes.
            array_stride: if given, the only member is a run-time array of its type with this
                stride in bytes.
        """
        key = ("block", *members, *offsets, array_stride)
        if key in self._declared:
            return self._declared[key]
        if array_stride is not None:
            array = self.new_id()
            append_instruction(self._globals, Op.TypeRuntimeArray, array, members[0])
            self.decorate(array, Decoration.ArrayStride, array_stride)
            members = [array]
        block = self.new_id()
        append_instruction(self._globals, Op.TypeStruct, block, *members)
        self.decorate(block, Decoration.Block)
        for index, offset in enumerate(offsets):
            append_instruction(
                self._decorations, Op.MemberDecorate, block, index, Decoration.Offset, offset
            )
        self._declared[key] = block
        return block

    # --------------------------------------------------- variables, constants

    def variable(self, storage_class: StorageClass, pointee: int, name: str) -> int:
        """Declare a variable at module scope and return its pointer."""
        pointer = self.new_id()
        pointer_type = self.pointer_type(storage_class, pointee)
        append_instruction(self._globals, Op.Variable, pointer_type, pointer, storage_class)
        self._variables.append((pointer, storage_class))
        self.name(pointer, name)
        return pointer

    def decorate(self, target: int, decoration: Decoration, *operands: int) -> None:
        """Decorate an id."""
        append_instruction(self._decorations, Op.Decorate, target, decoration, *operands)

    def name(self, target: int, text: str) -> None:
        """Give an id a name for listings."""
        append_instruction(self._names, Op.Name, target, *string_words(text))

    def constant(self, value: int | float | bool, dtype: DType) -> int:
        """Return the id of a scalar constant."""
        literal = _literal(value, dtype)
        if dtype.kind is Kind.BOOL:
            op = Op.ConstantTrue if literal[0] else Op.ConstantFalse
        else:
            op = Op.Constant
            self.use_arithmetic(dtype)
        key = ("constant", dtype, *literal)
        if key not in self._declared:
            result_type = self.type(dtype)
            self._declared[key] = new = self.new_id()
            operands = () if dtype.kind is Kind.BOOL else literal
            append_instruction(self._globals, op, result_type, new, *operands)
        return self._declared[key]

    # ----------------------------------------------------------------- writing

    def finish(
        self, name: str, local_size: tuple[int, int, int], variables: Words, body: Words
    ) -> bytes:
        """Return the words of the module, little endian.

        Args:
            name: of the entry point.
            local_size: threads of a workgroup along x, y, z.
            variables: instructions that declare the function's variables.
            body: its instructions after them, from the entry block on; blocks have ended.
        """
        void = self._declare(Op.TypeVoid)
        signature = self._declare(Op.TypeFunction, void)
        function, entry = self.new_id(), self.new_id()
        out: Words = []
        for capability in sorted(self._capabilities):
            append_instruction(out, Op.Capability, capability)
        for extension in sorted(self._extensions):
            append_instruction(out, Op.Extension, *string_words(extension))
        append_instruction(out, Op.ExtInstImport, self.glsl_import, *string_words(GLSL_STD_450))
        append_instruction(out, Op.MemoryModel, AddressingModel.Logical, self.memory_model)
        append_instruction(
            out,
            Op.EntryPoint,
            ExecutionModel.GLCompute,
            function,
            *string_words(name),
            *self._interface(),
        )
        append_instruction(out, Op.ExecutionMode, function, ExecutionMode.LocalSize, *local_size)
        out += self._names + self._decorations + self._globals
        append_instruction(out, Op.Function, void, function, FunctionControl.NoHint, signature)
        append_instruction(out, Op.Label, entry)
        out += variables + body
        append_instruction(out, Op.FunctionEnd)
        version, schema = self.target.spirv_version, 0
        header = [MAGIC_NUMBER, version, GENERATOR, self._last_id + 1, schema]
        return struct.pack(f"<{len(header) + len(out)}I", *header, *out)

    def _interface(self) -> Iterable[int]:
        """Return the entry point's inputs, and from SPIR-V 1.4 on all variables of the module."""
        every = self.target.spirv_version >= SPIRV_1_4
        return [pointer for pointer, kind in self._variables if every or kind is StorageClass.Input]


def _literal(value: int | float | bool, dtype: DType) -> list[int]:
    """Return the words of a constant; types narrower than a word are extended to one."""
    if dtype.kind is Kind.BOOL:
        return [int(bool(value))]
    if dtype.kind is Kind.FLOAT:
        return _float_literal(float(value), dtype.bits)
    value = int(value)
    if dtype.kind is Kind.UINT:
        value &= (1 << dtype.bits) - 1
    if dtype.bits == 64:
        return [value & WORD_MASK, value >> 32 & WORD_MASK]
    return [value & WORD_MASK]


def _float_literal(value: float, bits: int) -> list[int]:
    """Return the words of a floating-point constant, rounded to nearest; too large is infinite."""
    if bits == 64:
        return list(struct.unpack("<2I", struct.pack("<d", value)))
    with np.errstate(over="ignore"):
        if bits == 16:
            return [int(np.float16(value).view(np.uint16))]
        return [int(np.float32(value).view(np.uint32))]
