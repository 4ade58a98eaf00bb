"""A sum and the norm of it in one launch, where a target has such a kernel.

Decoders add to the residual stream and then normalise it: two launches over a row of a few
kilobytes, of which a launch's own time is most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from fairy_compile.compiler.passes import is_op
from fairy_compile.kernels.cuda_norm import NORM, build_rms_norm


@tvm.transform.module_pass(opt_level=0, name="FuseAddNorm")
class FuseAddNorm:
    """Let ``rms_norm(reshape(a + b))`` and ``a + b`` come from one call.

    The norm's function says by its attribute that this is possible (`kernels.cuda_norm`). Both
    operands must have the shape and dtype of the sum. Runs before operators are legalised.
    """

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Apply the rule to every Relax function of the module."""
        fuser = _Fuser(module)
        for var, func in module.functions_items():
            if isinstance(func, relax.Function):
                fuser.start(func)
                if fuser.norms:
                    fuser.builder_.update_func(var, fuser.visit_expr(func))
        return fuser.builder_.get()


@dataclass(frozen=True)
class _Norm:
    """A norm that follows a sum: the variable it is bound to, its function and its weight."""

    var: Any
    attrs: Any
    weight: Any


@mutator
class _Fuser(PyExprMutator):
    """Replaces sums and the norms that follow them.

    Attributes:
        norms: variable of a sum -> the norm of it.
    """

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.norms: dict[Any, _Norm] = {}
        self.done: dict[Any, Any] = {}

    def start(self, func: relax.Function) -> None:
        """Find what can be fused in a function."""
        self.norms, self.done = {}, {}
        values: dict[Any, Any] = {}
        order: dict[Any, int] = dict.fromkeys(func.params, -1)
        for block in func.body.blocks:
            for binding in block.bindings:
                values[binding.var] = getattr(binding, "value", None)
                order[binding.var] = len(order)
        for var, value in values.items():
            attrs = self._norm_attrs(value)
            if attrs is None:
                continue
            x, weight = value.args[1].fields
            total = _through_reshapes(x, values)
            adds = is_op(values.get(total), "relax.add")
            known = adds and order.get(weight, len(order)) < order[total]
            if known and total not in self.norms and _same_tensors(values[total]):
                self.norms[total] = _Norm(var, attrs, weight)

    def _norm_attrs(self, value: Any) -> Any:
        """Return the attributes of the norm that a value calls, None if it calls none."""
        if not is_op(value, "relax.call_tir"):
            return None
        func = self.module[value.args[0]]
        marked = isinstance(func, tirx.PrimFunc) and func.attrs is not None and NORM in func.attrs
        return func.attrs if marked and not func.attrs["add"] else None

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Emit the call in place of a sum; the norm's variable then is a part of it."""
        norm = self.norms.get(binding.var)
        if norm is not None:
            self.set_var_remap(binding.var, self._emit(binding, norm))
        elif binding.var in self.done:
            self.set_var_remap(binding.var, self.done[binding.var])
        else:
            super().visit_var_binding_(binding)

    def _emit(self, binding: relax.VarBinding, norm: _Norm) -> Any:
        emit, attrs = self.builder_.emit, norm.attrs
        function = build_rms_norm(
            int(attrs["size"]), float(attrs["eps"]), str(attrs["dtype"]), str(attrs["batch"]),
            add=True,
        ).with_attr("op_pattern", 8)  # fmt: skip
        symbol = self.builder_.add_func(function, f"add_rms_norm_{attrs['size']}_{attrs['batch']}")
        row_ty = norm.var.ty
        rows = row_ty.shape
        operands = [emit(relax.op.reshape(self.visit_expr(a), rows)) for a in binding.value.args]
        weight = self.visit_expr(norm.weight)
        both = emit(relax.call_tir(symbol, [*operands, weight], [row_ty, row_ty]))
        total = emit(relax.TupleGetItem(both, 0))
        self.done[norm.var] = emit(relax.TupleGetItem(both, 1))
        return emit(relax.op.reshape(total, binding.var.ty.shape))


def _through_reshapes(var: Any, values: dict[Any, Any]) -> Any:
    while is_op(values.get(var), "relax.reshape"):
        var = values[var].args[0]
    return var


def _same_tensors(add: relax.Call) -> bool:
    first, second = (arg.ty for arg in add.args)
    return first.dtype == second.dtype and tvm_ffi.structural_equal(first.shape, second.shape)
