"""Cooperative matrices (VK_KHR_cooperative_matrix): matrices that a subgroup holds together.

TIR says them with its ``cooperative_tensor_*`` operators on buffers of the scope
``metal.cooperative_tensor``, which TVM named after the first device that had them:

- ``cooperative_tensor_fill(d, index, value, rows, cols)``,
- ``cooperative_tensor_load(d, index, pointer, stride, rows, cols, transpose, M, N, K, role)``,
- ``cooperative_tensor_store`` with the same arguments,
- ``cooperative_tensor_multiply_accumulate(d, i, a, i, b, i, c, i, M, N, K, ...)``: d = a b + c.

``index`` is a constant that counts the matrices of a buffer, ``role`` a `CooperativeMatrixUse`: A
is M x K, B is K x N, the accumulator M x N. A matrix that is filled is an accumulator. Each is a
variable of the kernel's function, which drivers keep in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tvm import tirx
from tvm.ir import Call

from fairy_compile.codegen.spirv.dtypes import UINT32, DType, parse_dtype
from fairy_compile.codegen.spirv.enums import (
    Capability,
    CooperativeMatrixLayout,
    CooperativeMatrixUse,
    Extension,
    MemoryAccess,
    Op,
)

if TYPE_CHECKING:
    from fairy_compile.codegen.spirv.expressions import Expressions

SCOPE = "metal.cooperative_tensor"
_PREFIX = "cooperative_tensor_"
OPERATORS = tuple(_PREFIX + verb for verb in ("fill", "load", "store", "multiply_accumulate"))


class _Matrix(NamedTuple):
    """One matrix: its type, its variable."""

    type: int
    pointer: int


class Matrices:
    """The matrices of a kernel, declared at their first use."""

    def __init__(self, ex: Expressions) -> None:
        self._ex = ex
        self._components: dict[Any, DType] = {}
        self._declared: dict[tuple[Any, int], _Matrix] = {}

    def declare(self, buffer: Any) -> None:
        """Note a buffer of matrices."""
        self._components[buffer] = parse_dtype(str(buffer.dtype))

    def find(
        self, data: Any, index: Any, rows: int, columns: int, use: CooperativeMatrixUse
    ) -> _Matrix:
        """Return a matrix, declaring it the first time.

        Raises:
            UnsupportedError: its number is not a constant, or it is no matrix.
        """
        error = self._ex.error
        while isinstance(data, Call) and data.op.name.endswith("buffer_data"):
            data = data.args[0]
        if not isinstance(index, tirx.IntImm):
            raise error.unsupported(f"a cooperative matrix whose number is no constant, {index},")
        component = self._components.get(data)
        if component is None:
            raise error.unsupported(f"cooperative matrix {data}, which is not allocated,")
        key = data, int(index)
        if key not in self._declared:
            module = self._ex.module
            module.use_capability(Capability.CooperativeMatrixKHR)
            module.use_extension(Extension.COOPERATIVE_MATRIX)
            made = module.cooperative_matrix_type(component, rows, columns, use)
            pointer = self._ex.function.variable(made, f"matrix{len(self._declared)}")
            self._declared[key] = _Matrix(made, pointer)
        return self._declared[key]


def uses_matrices(statement: Any) -> bool:
    """Tell whether a function's body allocates cooperative matrices."""
    if type(statement).__name__ == "AllocBuffer":
        return str(statement.buffer.scope()) == SCOPE
    inner = list(getattr(statement, "seq", ()))
    for branch in ("body", "then_case", "else_case"):
        inner.append(getattr(statement, branch, None))
    return any(uses_matrices(part) for part in inner if part is not None)


def emit(ex: Expressions, name: str, call: Any) -> None:
    """Emit one of `OPERATORS`.

    Raises:
        UnsupportedError: the target has no cooperative matrices.
    """
    ex.module.target.cooperative_matrix(f"a cooperative matrix, {name},", ex.error)
    verb = name.removeprefix(_PREFIX)
    if verb == "fill":
        _fill(ex, call)
    elif verb == "multiply_accumulate":
        _multiply_accumulate(ex, call)
    else:
        _move(ex, call, loads=verb == "load")


def _fill(ex: Expressions, call: Any) -> None:
    data, index, value, rows, columns = call.args
    use = CooperativeMatrixUse.MatrixAccumulator
    matrix = ex.matrices.find(data, index, int(rows), int(columns), use)
    filled = ex.function.emit_impure(Op.CompositeConstruct, matrix.type, ex.value(value).id)
    ex.function.emit_void(Op.Store, matrix.pointer, filled)


def _move(ex: Expressions, call: Any, loads: bool) -> None:
    data, index, pointer, stride, rows, columns, transpose, *_, role = call.args
    use = CooperativeMatrixUse(int(role))
    matrix = ex.matrices.find(data, index, int(rows), int(columns), use)
    memory = _pointer(ex, pointer)
    layout = CooperativeMatrixLayout(int(bool(int(transpose))))
    how = (
        ex.module.constant(layout, UINT32),
        ex.arithmetic.cast(ex.value(stride), UINT32).id,
        MemoryAccess.NonPrivatePointer,
    )
    if loads:
        loaded = ex.function.emit_impure(Op.CooperativeMatrixLoadKHR, matrix.type, memory, *how)
        ex.function.emit_void(Op.Store, matrix.pointer, loaded)
        return
    held = ex.function.emit_impure(Op.Load, matrix.type, matrix.pointer)
    ex.function.emit_void(Op.CooperativeMatrixStoreKHR, memory, held, *how)


def _pointer(ex: Expressions, pointer: Any) -> int:
    """Return the pointer that ``address_of`` or ``tvm_access_ptr`` means."""
    name = pointer.op.name.split(".", 1)[1] if isinstance(pointer, Call) else ""
    if name == "address_of":
        load = pointer.args[0]
        (index,) = load.indices
        return ex.memory.shared_pointer(ex.buffer(load.source), ex.value(index))
    if name == "tvm_access_ptr":
        _, data, offset, *_ = pointer.args
        while isinstance(data, Call) and data.op.name.endswith("buffer_data"):
            data = data.args[0]
        return ex.memory.shared_pointer(ex.buffer(data), ex.value(offset))
    raise ex.error.unsupported(f"a cooperative matrix at {pointer}")


def _multiply_accumulate(ex: Expressions, call: Any) -> None:
    d, at_d, a, at_a, b, at_b, c, at_c, m, n, k, *_ = call.args
    m, n, k = int(m), int(n), int(k)
    left = ex.matrices.find(a, at_a, m, k, CooperativeMatrixUse.MatrixA)
    right = ex.matrices.find(b, at_b, k, n, CooperativeMatrixUse.MatrixB)
    use = CooperativeMatrixUse.MatrixAccumulator
    added, result = ex.matrices.find(c, at_c, m, n, use), ex.matrices.find(d, at_d, m, n, use)
    operands = [
        ex.function.emit_impure(Op.Load, matrix.type, matrix.pointer)
        for matrix in (left, right, added)
    ]
    total = ex.function.emit_impure(Op.CooperativeMatrixMulAddKHR, result.type, *operands)
    ex.function.emit_void(Op.Store, result.pointer, total)
