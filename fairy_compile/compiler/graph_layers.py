"""The linear layers of an imported graph: found, and replaced by kernel calls.

A linear layer is a matrix product with a constant matrix, whichever side the matrix is on and
whatever turns and casts lie between it and the product. Everything else stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from fairy_compile.compiler.graph_division import guard_division, refuse_division
from fairy_compile.compiler.graph_indices import guard_indices
from fairy_compile.compiler.passes import is_op
from fairy_compile.errors import UnsupportedError
from fairy_compile.frontends.graph import Graph, Matrix
from fairy_compile.models.linear import LinearCall, kernel_function, module_function
from fairy_compile.models.shapes import product
from fairy_compile.targets import Target

MAIN = "main"
_FLOATS = ("float32", "float16", "bfloat16")
_Step = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Kept:
    """A product with a constant that is not converted.

    Attributes:
        name: of the layer.
        shape: of the constant.
        reason: why, in words.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class GraphLayers:
    """What `find_layers` found.

    Attributes:
        matrices: the linear layers' matrices, in order of use.
        kept: products with constants that stay as they are.
        counts: operator name -> uses, of other operators that read weights or multiply.
        sites: binding variable -> (layer, whether the matrix is the left operand).
    """

    matrices: list[Matrix] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sites: dict[Any, tuple[str, bool]] = field(default_factory=dict)


def find_layers(graph: Graph) -> GraphLayers:
    """Find the linear layers of a graph; changes nothing.

    Raises:
        UnsupportedError: a weight without elements, or a division of integers by a constant 0.
    """
    main = graph.module[MAIN]
    inputs = len(graph.inputs)
    weights = dict(zip(list(main.params)[inputs:], graph.weights, strict=True))
    values = dict(relax.analysis.get_var2val(main).items())
    found = GraphLayers()
    known: dict[tuple[str, tuple[_Step, ...], bool], int] = {}
    names: set[str] = set()
    for weight_name, weight in graph.weights.items():
        _refuse_empty(graph, weight_name, weight.shape)
    for var, value in _bindings(main):
        refuse_division(graph.name, value)
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            continue
        if value.op.name != "relax.matmul":
            if value.op.name.startswith("relax.nn.conv") or value.op.name == "relax.einsum":
                found.counts[value.op.name.removeprefix("relax.").removeprefix("nn.")] += 1
            continue
        operands = [_resolve(arg, weights, values) for arg in value.args]
        left = operands[1] is None
        operand = operands[0] if left else operands[1]
        if operand is None:
            found.counts["matmul of two activations"] += 1
            continue
        root, steps = operand
        name, array_shape, dtype, read = _root(root, graph, weights, len(found.sites))
        _refuse_empty(graph, name, array_shape)
        shape, dtype = _after(array_shape, dtype, steps)
        reason = _refusal(value, shape, dtype, left)
        if reason is not None:
            found.kept.append(Kept(name, shape, reason))
            continue
        origin = weights.get(root)
        key = (graph.same.get(origin, origin) if origin else f"const{id(root)}", steps, left)
        if key in known:
            index = known[key]
            matrix = found.matrices[index]
            found.matrices[index] = replace(matrix, calls=matrix.calls + 1)
        else:
            while name in names:  # another turn of a weight that is shared, or a namesake
                name += "_"
            names.add(name)
            known[key] = len(found.matrices)
            matrix = Matrix(
                layer=name,
                weight=weights.get(root, ""),
                shape=shape if left else (shape[1], shape[0]),
                dtype=dtype,
                dense=_Dense(read, steps, transposed=not left),
            )
            found.matrices.append(matrix)
        found.sites[var] = (matrix.layer, left)
    for _, branch in _branches(graph.module):
        products = sum(is_op(value, "relax.matmul") for _, value in _bindings(branch))
        found.counts += Counter({"matmul in a branch": products})  # none is not counted
    return found


def _refuse_empty(graph: Graph, weight: str, shape: tuple[int, ...]) -> None:
    """Raise `UnsupportedError` for a weight without elements, which TVM cannot multiply with."""
    if 0 in shape:
        raise UnsupportedError(
            f"{graph.name}: the weight {weight} has the shape {list(shape)}, so no elements; "
            "allowed: sizes of at least 1; leave what reads it out of the graph"
        )


class _Dense:
    """A call that returns a matrix as (out, in): the stored array, turned as the graph turns it."""

    def __init__(self, read: Any, steps: Sequence[_Step], transposed: bool) -> None:
        self._read, self._steps, self._transposed = read, steps, transposed

    def __call__(self) -> np.ndarray:
        array = self._read()
        for kind, values in self._steps:
            if kind == "permute":
                array = np.transpose(array, values)
            elif kind == "reshape":
                array = np.reshape(array, values)
            else:
                array = array.astype(values[0])
        return array.T if self._transposed else array


def _bindings(main: relax.Function) -> Iterator[tuple[Any, Any]]:
    """Yield (variable, value) of the function's own bindings, not those of branches."""
    for block in main.body.blocks:
        for binding in block.bindings:
            if isinstance(binding, relax.VarBinding):
                yield binding.var, binding.value


def _branches(module: tvm.IRModule) -> Iterator[tuple[tvm.ir.GlobalVar, relax.Function]]:
    """Yield the functions besides ``main``: branches of PyTorch's `cond`."""
    for var, function in module.functions_items():
        if isinstance(function, relax.Function) and var.name_hint != MAIN:
            yield var, function


def _resolve(
    expr: Any, weights: Mapping[Any, str], values: Mapping[Any, Any]
) -> tuple[Any, tuple[_Step, ...]] | None:
    """Follow an operand to the weight or constant it is made of; None if it is an activation."""
    steps: list[_Step] = []
    while True:
        if isinstance(expr, tvm.ir.GenericConst) or expr in weights:
            return expr, tuple(reversed(steps))
        if isinstance(expr, relax.Var):
            if expr not in values:
                return None
            expr = values[expr]
        elif isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            step = _step(expr)
            if step is None:
                return None
            steps.append(step)
            expr = expr.args[0]
        else:
            return None


def _step(call: relax.Call) -> _Step | None:
    """Return what an operator does to a constant operand, None if it is none of these."""
    name = call.op.name
    if name == "relax.permute_dims":
        rank = int(call.args[0].ty.ndim)
        axes = call.attrs.axes
        order = range(rank)[::-1] if axes is None else [int(axis) % rank for axis in axes]
        return "permute", tuple(order)
    if name in ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten"):
        shape = _static(call.ty)
        return None if shape is None else ("reshape", shape)
    if name == "relax.astype" and str(call.ty.dtype) in _FLOATS:
        return "cast", (str(call.ty.dtype),)
    return None


def _static(ty: Any) -> tuple[int, ...] | None:
    """Return a tensor's shape if it is known and constant."""
    values = getattr(getattr(ty, "shape", None), "values", None)
    if values is None or not all(isinstance(v, int | tirx.IntImm) for v in values):
        return None
    return tuple(int(v) for v in values)


def _root(
    root: Any, graph: Graph, weights: Mapping[Any, str], number: int
) -> tuple[str, tuple[int, ...], str, Any]:
    """Return (layer name, shape, dtype, function that reads it) of a weight or constant."""
    if root in weights:
        weight = graph.weights[weights[root]]
        return weight.layer, weight.shape, weight.dtype, weight.read
    array = root.value.numpy()
    return f"matmul_{number}", array.shape, str(array.dtype), lambda: array


def _after(
    shape: tuple[int, ...], dtype: str, steps: Sequence[_Step]
) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of a constant after the steps."""
    for kind, values in steps:
        if kind == "permute":
            shape = tuple(shape[axis] for axis in values)
        elif kind == "reshape":
            shape = values
        else:
            dtype = values[0]
    return shape, dtype


def _refusal(call: relax.Call, shape: tuple[int, ...], dtype: str, left: bool) -> str | None:
    """Return why a product with a constant cannot become a kernel call, or None."""
    if len(shape) != 2:
        return f"its weight has {len(shape)} dimensions; only matrices are converted"
    if dtype not in _FLOATS:
        return f"its weight is {dtype}; allowed: {', '.join(_FLOATS)}"
    x = call.args[1 if left else 0]
    if getattr(x.ty.shape, "values", None) is None:
        return "the shape of its input is not known when the graph is compiled"
    return None


def replace_layers(
    graph: Graph,
    layers: GraphLayers,
    calls: Mapping[str, LinearCall],
    names: Mapping[str, str],
    target: Target,
) -> tuple[tvm.IRModule, list[tuple[str, LinearCall | None, str]]]:
    """Return the graph's module with kernel calls in place of its linear layers.

    Args:
        graph: the network.
        layers: what `find_layers` found in it.
        calls: layer -> planned call.
        names: weight -> parameter that holds it as other operators read it.
        target: what is compiled for.

    Returns:
        (module, parameters): the function ``main`` takes the inputs, then one tuple of all
        parameters, of which the list gives (name, call or None, array).
    """
    main = graph.module[MAIN]
    replacer = _Replacer(graph.module, layers.sites, calls, target)
    body = replacer.visit_expr(main.body)
    for var, branch in _branches(graph.module):
        replacer.builder_.update_func(var, replacer.visit_expr(branch))
    inputs = list(main.params)[: len(graph.inputs)]
    weights = dict(zip(list(main.params)[len(graph.inputs) :], graph.weights, strict=True))
    attrs = {"num_input": len(inputs)}
    function = relax.Function(
        [*inputs, *replacer.vars, *weights], body, main.ret_ty, is_pure=main.is_pure
    ).with_attrs({"global_symbol": MAIN, **attrs})
    module = replacer.builder_.get()
    module[MAIN] = function
    module = relax.transform.Normalize()(module)
    module = relax.transform.DeadCodeElimination([MAIN])(module)
    function = module[MAIN]
    used = set(relax.analysis.free_vars(function.body))
    params = [
        (var, info) for var, info in zip(replacer.vars, replacer.infos, strict=True) if var in used
    ]
    params += [(var, (names[w], None, names[w])) for var, w in weights.items() if var in used]
    module[MAIN] = relax.Function(
        [*inputs, *(var for var, _ in params)],
        function.body,
        function.ret_ty,
        is_pure=function.is_pure,
    ).with_attrs({"global_symbol": MAIN, **attrs})
    module = relax.transform.BundleModelParams()(module)
    return module, [info for _, info in params]


@mutator
class _Replacer(PyExprMutator):
    """Replaces matrix products by kernel calls, and operators that trust their operands.

    Attributes:
        vars: parameters of the calls.
        infos: (name, call, array) of each.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        sites: Mapping[Any, tuple[str, bool]],
        calls: Mapping[str, LinearCall],
        target: Target,
    ) -> None:
        super().__init__(module)
        self.sites, self.calls, self.target = sites, calls, target
        self.vars: list[relax.Var] = []
        self.infos: list[tuple[str, LinearCall | None, str]] = []
        self._arrays: dict[str, list[relax.Var]] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Replace the value of a site's binding."""
        site = self.sites.get(binding.var)
        if site is None:
            super().visit_var_binding_(binding)
            return
        layer, left = site
        x = self.visit_expr(binding.value.args[1 if left else 0])
        y = self._linear(x, self.calls[layer], left, str(binding.value.ty.dtype))
        builder = self.builder_
        inner = (
            isinstance(binding.var, relax.DataflowVar) or not builder.current_block_is_dataflow()
        )
        # What is read outside of a dataflow block has to be one of its outputs.
        self.set_var_remap(binding.var, builder.emit(y) if inner else builder.emit_output(y))

    def visit_call_(self, op: relax.Call) -> Any:
        """Keep look-ups and scatters inside of their arrays, and divisions from stopping."""
        call = guard_division(self.builder_, super().visit_call_(op))
        return guard_indices(self.builder_, call, self.target.is_gpu)

    def _linear(self, x: Any, call: LinearCall, left: bool, dtype: str) -> Any:
        op, emit = relax.op, self.builder_.emit
        turned = left and int(x.ty.ndim) > 1
        if turned:
            x = emit(op.permute_dims(x, _last_two_swapped(int(x.ty.ndim))))
        *lead, in_features = x.ty.shape.values
        rows = product(lead)
        out = sum(call.out_features)
        batch = "single" if isinstance(rows, int) and rows == 1 else "many"
        flat = emit(op.reshape(x, (rows, in_features)))
        if str(x.ty.dtype) != call.act_dtype:
            flat = emit(op.astype(flat, call.act_dtype))
        function = kernel_function(call, self.target, batch)
        symbol = self.builder_.add_func(*module_function(function, call, batch))
        y = emit(
            relax.call_tir(
                symbol,
                [flat, *self._parameters(call)],
                relax.TensorType((rows, out), call.out_dtype),
            )
        )
        if call.out_dtype != dtype:
            y = emit(op.astype(y, dtype))
        y = op.reshape(y, (*lead, out))
        if turned:
            y = op.permute_dims(emit(y), _last_two_swapped(len(lead) + 1))
        return y

    def _parameters(self, call: LinearCall) -> list[relax.Var]:
        """Return the variables of a call's arrays, the same for every use of a shared weight."""
        if call.name not in self._arrays:
            own = []
            for suffix, array in call.arrays().items():
                name = f"{call.name}.{suffix}"
                own.append(relax.Var(name, relax.TensorType(array.shape, array.dtype)))
                self.infos.append((name, call, suffix))
            self.vars += own
            self._arrays[call.name] = own
        return self._arrays[call.name]


def _last_two_swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]
