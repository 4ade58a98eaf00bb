"""Buffers: storage buffers of the kernel's arguments, shared and private arrays, scalar arguments.

The layout of arguments is that of TVM's Vulkan runtime. Buffer number i is the storage buffer at
binding i of descriptor set 0. Scalars are members of one block, 8 bytes each: push constants up to
16 of them, else a uniform buffer at the binding after the last buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fairy_compile.codegen.spirv.dtypes import (
    INT32,
    MAX_LANES,
    UINT8,
    DType,
    Kind,
)
from fairy_compile.codegen.spirv.enums import (
    Decoration,
    MemoryAccess,
    MemoryModel,
    Op,
    StorageClass,
)
from fairy_compile.codegen.spirv.function import FunctionBuilder
from fairy_compile.codegen.spirv.values import Arithmetic, Value

DESCRIPTOR_SET = 0
SCALAR_SLOT_BYTES = 8
MAX_PUSH_CONSTANT_SCALARS = 16
"""TVM's runtime passes at most 128 bytes as push constants."""


class Buffer(NamedTuple):
    """A buffer that a kernel reads or writes.

    Attributes:
        name: for errors.
        pointer: id of the variable.
        storage_class: where it lives.
        element: type that one index addresses in TIR.
        cell: type that one index addresses in SPIR-V: a scalar, or a vector of two or four lanes
            that divides ``element``.
        volatile: whether accesses must not be reordered or left out.
    """

    name: str
    pointer: int
    storage_class: StorageClass
    element: DType
    cell: DType
    volatile: bool = False

    @property
    def cells(self) -> int:
        """Cells of one element."""
        return self.element.lanes // self.cell.lanes


def cell_of(element: DType) -> DType:
    """Return the widest vector that divides ``element`` and is packed in memory without gaps.

    Vectors of three lanes would be padded to four.
    """
    for lanes in (MAX_LANES, 2):
        if element.lanes % lanes == 0:
            return element.with_lanes(lanes)
    return element.scalar


class Memory:
    """Declares buffers, and loads from and stores to them.

    Attributes:
        shared_bytes: size of all shared arrays declared so far.
    """

    def __init__(self, function: FunctionBuilder, arithmetic: Arithmetic):
        self.shared_bytes = 0
        self._bindings: dict[int, int] = {}
        self._views: dict[tuple[int, int], Buffer] = {}
        self._function = function
        self._module = function.module
        self._arithmetic = arithmetic

    # ------------------------------------------------------------- declaration

    def storage_buffer(self, name: str, element: DType, binding: int) -> Buffer:
        """Declare the storage buffer of an argument. Booleans are bytes in memory."""
        if element.kind is Kind.BOOL:
            element = UINT8.with_lanes(element.lanes)
        cell = cell_of(element)
        self._module.use_storage(cell)
        stride = cell.lane_bytes * cell.lanes
        block = self._module.block_type([self._module.type(cell)], [0], array_stride=stride)
        pointer = self._bound_variable(StorageClass.StorageBuffer, block, name, binding)
        self._bindings[pointer] = binding
        return Buffer(name, pointer, StorageClass.StorageBuffer, element, cell)

    def vector_view(self, buffer: Buffer, lanes: int) -> Buffer:
        """Return the storage buffer of scalars as one of vectors, at the same binding.

        TVM keeps arguments as buffers of scalars, of which only scalars can be loaded.
        """
        key = buffer.pointer, lanes
        if key not in self._views:
            element = buffer.element.with_lanes(lanes)
            binding = self._bindings[buffer.pointer]
            view = self.storage_buffer(f"{buffer.name}x{lanes}", element, binding)
            if all(known != buffer.pointer for known, _ in self._views):
                self._module.decorate(buffer.pointer, Decoration.Aliased)
            self._module.decorate(view.pointer, Decoration.Aliased)
            self._views[key] = view
        return self._views[key]

    def shared_array(self, name: str, element: DType, length: int, volatile: bool) -> Buffer:
        """Declare an array that the threads of a block share."""
        self.shared_bytes += element.lane_bytes * element.lanes * length
        return self._array(name, element, length, StorageClass.Workgroup, volatile)

    def private_array(self, name: str, element: DType, length: int) -> Buffer:
        """Declare an array that every thread has for itself."""
        return self._array(name, element, length, StorageClass.Function, False)

    def _array(
        self, name: str, element: DType, length: int, storage_class: StorageClass, volatile: bool
    ) -> Buffer:
        cell = cell_of(element)
        self._module.use_arithmetic(cell)
        cells = length * (element.lanes // cell.lanes)
        array = self._module.array_type(self._module.type(cell), cells)
        if storage_class is StorageClass.Function:
            pointer = self._function.variable(array, name)
        else:
            pointer = self._module.variable(storage_class, array, name)
        return Buffer(name, pointer, storage_class, element, cell, volatile)

    def scalars(self, names: Sequence[str], dtypes: Sequence[DType], binding: int) -> list[Value]:
        """Declare the scalar arguments and load them.

        Args:
            names: of the arguments, for errors.
            dtypes: their types, 32 or 64 bits wide.
            binding: of the uniform buffer, should there be too many for push constants.

        Raises:
            UnsupportedError: a scalar of another width, which TVM's runtime cannot pass.
        """
        for name, dtype in zip(names, dtypes, strict=True):
            if dtype.bits not in (32, 64):
                raise self._module.error.unsupported(f"scalar argument {name} of type {dtype}")
        members = [self._module.type(dtype) for dtype in dtypes]
        offsets = [SCALAR_SLOT_BYTES * i for i in range(len(dtypes))]
        block = self._module.block_type(members, offsets)
        if uses_uniform_buffer(len(dtypes)):
            storage_class = StorageClass.Uniform
            pointer = self._bound_variable(storage_class, block, "scalars", binding)
        else:
            storage_class = StorageClass.PushConstant
            pointer = self._module.variable(storage_class, block, "scalars")
        values = []
        for index, (dtype, member) in enumerate(zip(dtypes, members, strict=True)):
            chain = self._function.emit_typed(
                Op.AccessChain,
                self._module.pointer_type(storage_class, member),
                pointer,
                self._module.constant(index, INT32),
            )
            # Constant while the kernel runs, so equal loads are one.
            values.append(Value(dtype, (self._function.emit(Op.Load, dtype, chain),)))
        return values

    def _bound_variable(
        self, storage_class: StorageClass, block: int, name: str, binding: int
    ) -> int:
        pointer = self._module.variable(storage_class, block, name)
        self._module.decorate(pointer, Decoration.DescriptorSet, DESCRIPTOR_SET)
        self._module.decorate(pointer, Decoration.Binding, binding)
        return pointer

    # ------------------------------------------------------------------ access

    def load(self, buffer: Buffer, indices: Sequence[Value], dtype: DType) -> Value:
        """Load one element for each index and return them as one value of ``dtype``."""
        stored = self._stored_type(buffer, dtype)
        self._check(buffer, len(indices), dtype, "load")
        cells = [
            self._load_cell(buffer, index, cell)
            for index in indices
            for cell in range(buffer.cells)
        ]
        if stored.parts() == tuple(cell.dtype for cell in cells):
            value = Value(stored, tuple(cell.id for cell in cells))
        else:
            value = self._arithmetic.pack(
                [lane for cell in cells for lane in self._arithmetic.lanes(cell)]
            )
        return self._arithmetic.cast(value, dtype)

    def store(self, buffer: Buffer, indices: Sequence[Value], value: Value) -> None:
        """Store the lanes of ``value`` to one element for each index."""
        self._check(buffer, len(indices), value.dtype, "store")
        value = self._arithmetic.cast(value, self._stored_type(buffer, value.dtype))
        count = len(indices) * buffer.cells
        cell_types = (buffer.cell,) * count
        if value.dtype.parts() == cell_types:
            cells = [Value(buffer.cell, (part,)) for part in value.parts]
        else:
            lanes, width = self._arithmetic.lanes(value), buffer.cell.lanes
            cells = [
                self._arithmetic.pack(lanes[i * width : (i + 1) * width]) for i in range(count)
            ]
        for i, cell in enumerate(cells):
            index, offset = divmod(i, buffer.cells)
            chain = self._chain(buffer, indices[index], offset)
            self._function.emit_void(Op.Store, chain, cell.id, *self._access(buffer))

    def shared_pointer(self, buffer: Buffer, index: Value) -> int:
        """Return the pointer to an element that an instruction reads or writes by itself.

        Raises:
            UnsupportedError: an element is no scalar.
        """
        if buffer.element.lanes > 1:
            raise self._module.error.unsupported(
                f"a pointer into buffer {buffer.name} of vectors, {buffer.element},"
            )
        return self._chain(buffer, index, 0)

    def _access(self, buffer: Buffer) -> tuple[int, ...]:
        """Return the operand that tells how memory is accessed, if one is needed."""
        access = MemoryAccess.Volatile if buffer.volatile else 0
        # Vulkan's memory model takes memory for a thread's own unless told otherwise.
        shared = buffer.storage_class in (StorageClass.Workgroup, StorageClass.StorageBuffer)
        if shared and self._module.memory_model is MemoryModel.Vulkan:
            access |= MemoryAccess.NonPrivatePointer
        return (int(access),) if access else ()

    def _load_cell(self, buffer: Buffer, index: Value, offset: int) -> Value:
        chain = self._chain(buffer, index, offset)
        cell_type = self._module.type(buffer.cell)
        loaded = self._function.emit_impure(Op.Load, cell_type, chain, *self._access(buffer))
        return Value(buffer.cell, (loaded,))

    def _chain(self, buffer: Buffer, index: Value, offset: int) -> int:
        """Return the pointer to a cell of the element at ``index``."""
        if buffer.cells > 1:
            arithmetic = self._arithmetic
            scaled = arithmetic.binary("Mul", index, arithmetic.constant(buffer.cells, index.dtype))
            index = arithmetic.binary("Add", scaled, arithmetic.constant(offset, index.dtype))
        pointer_type = self._module.pointer_type(
            buffer.storage_class, self._module.type(buffer.cell)
        )
        if buffer.storage_class is StorageClass.StorageBuffer:
            path = (self._module.constant(0, INT32), index.id)  # the block's only member
        else:
            path = (index.id,)
        return self._function.emit_typed(Op.AccessChain, pointer_type, buffer.pointer, *path)

    def _stored_type(self, buffer: Buffer, dtype: DType) -> DType:
        """Return the type that a value of ``dtype`` has in the buffer."""
        if dtype.kind is Kind.BOOL:
            return buffer.element.with_lanes(dtype.lanes)
        return dtype

    def _check(self, buffer: Buffer, indices: int, dtype: DType, verb: str) -> None:
        stored, element = self._stored_type(buffer, dtype), buffer.element
        if stored != element.with_lanes(element.lanes * indices):
            raise self._module.error.unsupported(
                f"{verb} of {dtype} with {indices} indices from buffer {buffer.name} of {element}"
            )


def uses_uniform_buffer(scalars: int) -> bool:
    """Tell whether so many scalar arguments travel in a uniform buffer."""
    return scalars > MAX_PUSH_CONSTANT_SCALARS
