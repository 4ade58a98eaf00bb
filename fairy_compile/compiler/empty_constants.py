"""Constants without elements, as ``torch.zeros(8, 0)``, which TVM writes but cannot read again.

Nothing reads what such an array holds, so it need not be stored: it is allocated when the graph
runs.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


@tvm.transform.module_pass(opt_level=0, name="AllocateEmptyConstants")
class AllocateEmptyConstants:
    """Replace constants without elements by tensors that are allocated; after memory is planned."""

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Apply it to every Relax function of the module."""
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for var, func in module.functions_items():
            if isinstance(func, relax.Function):
                updated[var] = _Allocator(module).visit_expr(func)
        return updated


@mutator
class _Allocator(PyExprMutator):
    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> Any:
        """Return a constant as it is, or one without elements as a variable that holds it."""
        if not isinstance(op.value, tvm.runtime.Tensor) or math.prod(op.value.shape):
            return op
        shape = relax.ShapeExpr([int(size) for size in op.value.shape])
        empty = relax.op.builtin.alloc_tensor(shape, str(op.value.dtype), 0)
        return self.builder_.emit(empty)
