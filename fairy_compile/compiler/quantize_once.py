"""Activations of one row are quantised by the kernel that computes them, where a target has such.

A layer that decodes one row quantises it first, in every block that computes some of its outputs.
Where the row comes from a norm or from the product of a gate, and only such layers take it, that
kernel writes it as integers (`kernels.cuda_image`) and the layers read these. Where it comes from a
norm, and a single layer takes it, the layer normalises it itself, in every block: that takes less
time than another launch. Numbers are the same but for the order in which squares are added: the row
is rounded to its dtype before it is quantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from fairy_compile.compiler.passes import is_op
from fairy_compile.kernels import cuda_image
from fairy_compile.kernels.cuda import DECODE, Norm, kernel_of
from fairy_compile.kernels.cuda_gate import GATE, build_gate_product
from fairy_compile.kernels.cuda_norm import NORM, build_rms_norm


@tvm.transform.module_pass(opt_level=0, name="QuantizeOnce")
class QuantizeOnce:
    """Let producers of quantised rows write them as integers.

    Functions say by their attributes what they are. Runs after `FuseAddNorm` and before operators
    are legalised.
    """

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Apply the rule to every Relax function of the module."""
        rewriter = _Rewriter(module)
        for var, func in module.functions_items():
            if isinstance(func, relax.Function):
                rewriter.start(func)
                if rewriter.producers:
                    rewriter.builder_.update_func(var, rewriter.visit_expr(func))
        return rewriter.builder_.get()


@dataclass(frozen=True)
class _Producer:
    """A call whose row only layers that decode take.

    Attributes:
        row: the variable of the row, which is the call's own or a part of it.
        attrs: of its function.
        act: contract of the layers.
        layer: the variable of the layer's call that normalises the row itself, if one does.
    """

    row: Any
    attrs: Any
    act: str
    layer: Any = None


@mutator
class _Rewriter(PyExprMutator):
    """Replaces producers and the layers that follow them.

    Attributes:
        producers: variable of a call -> what it produces.
        takers: variable of a layer's call -> the variable of the row it takes.
        dropped: variables of rows as numbers, and of reshapes of them.
        images: variable of a row -> its image.
        normed: variable of the call of a layer that normalises its row -> its output.
        values: variable -> what it is bound to.
        order: variable -> its place among bindings.
    """

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.start(None)

    def start(self, func: relax.Function | None) -> None:
        """Find what can be replaced in a function."""
        self.producers: dict[Any, _Producer] = {}
        self.takers: dict[Any, Any] = {}
        self.dropped: set[Any] = set()
        self.images: dict[Any, Any] = {}
        self.normed: dict[Any, Any] = {}
        if func is None:
            return
        values, users = _values_and_users(func)
        self.values, self.order = values, {var: i for i, var in enumerate(values)}
        for var, value in values.items():
            attrs = self._attrs(value)
            if attrs is None or not (NORM in attrs or GATE in attrs):
                continue
            row = var
            if attrs.get("add", False):
                parts = [u for u in users[var] if isinstance(values.get(u), relax.TupleGetItem)]
                if len(parts) != len(users[var]):
                    continue
                rows = [u for u in parts if values[u].index == 1]
                if len(rows) != 1:
                    continue
                row = rows[0]
            self._consider(var, row, attrs, values, users)

    def _consider(self, var: Any, row: Any, attrs: Any, values: Any, users: Any) -> None:
        if str(attrs.get("batch", "single")) != "single" or not cuda_image.serves(
            int(attrs["size"])
        ):
            return
        takers, reshapes, pending = [], [], [row]
        while pending:
            one = pending.pop()
            for user in users[one]:
                value = values.get(user)
                if is_op(value, "relax.reshape"):
                    reshapes.append(user)
                    pending.append(user)
                elif self._takes(value, one):
                    takers.append(user)
                else:
                    return  # needed as numbers
        acts = {self._call(values[taker])[1].act for taker in takers}
        if len(acts) == 1:
            layer = takers[0] if NORM in attrs and self._normalises(takers, row, var) else None
            self.producers[var] = _Producer(row, attrs, acts.pop(), layer)
            self.takers |= dict.fromkeys(takers, row)
            self.dropped |= {row, *reshapes} - {var}

    def _normalises(self, takers: list[Any], row: Any, norm: Any) -> bool:
        """Tell whether a row's only layer may normalise it, in the place of the norm."""
        if len(takers) != 1:
            return False
        call = self.values[takers[0]]
        kernel, spec, _ = self._call(call)
        weights = call.args[1].fields[1:]
        bound = all(self.order.get(weight, -1) < self.order[norm] for weight in weights)
        return bound and kernel.normalises(spec)

    def _takes(self, value: Any, row: Any) -> bool:
        """Tell whether a value is a call of a layer that decodes ``row``, and uses it once."""
        attrs = self._attrs(value)
        if attrs is None or DECODE not in attrs:
            return False
        x, *others = value.args[1].fields
        return x.same_as(row) and not any(other.same_as(row) for other in others)

    def _attrs(self, value: Any) -> Any:
        """Return the attributes of the function that a value calls, None if it calls none."""
        if not is_op(value, "relax.call_tir"):
            return None
        func = self.module[value.args[0]]
        return func.attrs if isinstance(func, tirx.PrimFunc) else None

    def _call(self, value: Any) -> Any:
        return kernel_of(str(self._attrs(value)[DECODE]))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Emit the calls that make and take images; drop what only reshapes rows."""
        producer = self.producers.get(binding.var)
        if producer is not None and producer.layer is not None:
            self._produce_layer(binding, producer)
        elif producer is not None:
            self._produce(binding, producer)
        elif binding.var in self.normed:
            self.set_var_remap(binding.var, self.normed[binding.var])
        elif binding.var in self.takers:
            self._take(binding, self.images[self.takers[binding.var]])
        elif binding.var not in self.dropped:
            super().visit_var_binding_(binding)

    def _produce(self, binding: relax.VarBinding, producer: _Producer) -> None:
        attrs, act, emit = producer.attrs, producer.act, self.builder_.emit
        size, dtype = int(attrs["size"]), str(attrs["dtype"])
        if GATE in attrs:
            add, name = False, str(attrs["activation"])
            func = build_gate_product(name, size, dtype, act)
        else:
            add, name = bool(attrs["add"]), f"{'add_' if attrs['add'] else ''}rms_norm"
            func = build_rms_norm(size, float(attrs["eps"]), dtype, "single", add=add, act=act)
        symbol = self._add(func, f"{name}_{size}_{act}")
        image_ty = relax.TensorType((1, cuda_image.image_bytes(size // 2, act)), "uint8")
        call = binding.value
        types = [call.ty_args[0].fields[0], image_ty] if add else image_ty
        args = [self.visit_expr(arg) for arg in call.args[1].fields]
        made = emit(relax.call_tir(symbol, args, types))
        if add:
            self.set_var_remap(binding.var, made)  # its first part is the sum
            made = emit(relax.TupleGetItem(made, 1))
        self.images[producer.row] = made

    def _produce_layer(self, binding: relax.VarBinding, producer: _Producer) -> None:
        attrs, emit, layer = producer.attrs, self.builder_.emit, self.values[producer.layer]
        add = bool(attrs["add"])
        kernel, spec, knobs = self._call(layer)
        func = kernel.build_normed(spec, knobs, Norm(float(attrs["eps"]), add))
        symbol = self._add(func, f"{layer.args[0].name_hint}_normed")
        given = (*binding.value.args[1].fields, *layer.args[1].fields[1:])
        args = [self.visit_expr(arg) for arg in given]
        types = layer.ty_args[0]
        if add:
            types = [binding.value.ty_args[0].fields[0], types]
        made = emit(relax.call_tir(symbol, args, types))
        if add:
            self.set_var_remap(binding.var, made)  # its first part is the sum
            made = emit(relax.TupleGetItem(made, 1))
        self.normed[producer.layer] = made

    def _take(self, binding: relax.VarBinding, image: Any) -> None:
        call = binding.value
        kernel, spec, knobs = self._call(call)
        name = f"{call.args[0].name_hint}_image"
        symbol = self._add(kernel.build_from_image(spec, knobs), name)
        args = [self.visit_expr(arg) for arg in call.args[1].fields[1:]]
        made = relax.call_tir(symbol, [image, *args], call.ty_args[0])
        self.set_var_remap(binding.var, self.builder_.emit(made))

    def _add(self, func: tirx.PrimFunc, name: str) -> Any:
        return self.builder_.add_func(func.with_attr("op_pattern", 8), name)


def _values_and_users(func: relax.Function) -> tuple[dict[Any, Any], dict[Any, list[Any]]]:
    """Return variable -> what it is bound to, and variable -> variables whose values use it.

    What a function returns is used by None.
    """
    values: dict[Any, Any] = {}
    users: dict[Any, list[Any]] = {}
    for block in func.body.blocks:
        for binding in block.bindings:
            value = getattr(binding, "value", None)
            values[binding.var] = value
            for used in relax.analysis.free_vars(value) if value is not None else ():
                users.setdefault(used, []).append(binding.var)
            users.setdefault(binding.var, [])
    for used in relax.analysis.free_vars(func.body.body):
        users.setdefault(used, []).append(None)
    return values, users
