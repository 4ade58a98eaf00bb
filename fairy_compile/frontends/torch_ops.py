"""Operators of PyTorch that TVM's importer takes for something else, put right.

Each converter gets a node of the exported graph and TVM's importer, and returns the node's value.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst


def _dtype(node: Any) -> str:
    """Return the dtype that PyTorch gives a node's value."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _cast(importer: Any, value: Any, dtype: str) -> Any:
    """Return a number or a tensor as a tensor of ``dtype``."""
    if not isinstance(value, relax.Expr):
        return relax.const(value, dtype)
    if str(value.ty.dtype) == dtype:
        return value
    return importer.block_builder.emit(relax.op.astype(value, dtype))


def _product(node: Any, importer: Any) -> Any:
    a, b = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.matmul(a, b))


def _product_plus(node: Any, importer: Any) -> Any:
    added, a, b = importer.retrieve_args(node)
    emit = importer.block_builder.emit
    value = emit(relax.op.matmul(a, b))
    factors = {name: node.kwargs.get(name, 1) for name in ("alpha", "beta")}
    dtype = str(value.ty.dtype)
    if factors["alpha"] != 1:
        value = emit(relax.op.multiply(value, relax.const(factors["alpha"], dtype)))
    if factors["beta"] != 1:
        added = emit(relax.op.multiply(added, relax.const(factors["beta"], dtype)))
    return emit(relax.op.add(value, added))


def _elementwise(node: Any, importer: Any) -> Any:
    """Compute an operator of two operands in the dtype that PyTorch computes it in.

    TVM's takes the tensor's where the other is a number: 2.5 becomes 2 beside integers. It divides
    integers without a rest, and leaves out the factor ``alpha``.
    """
    import torch

    overload = str(node.target).removeprefix("aten.")
    name = overload.partition(".")[0]
    op, plain = _ELEMENTWISE[name]
    values = importer.retrieve_args(node)[:2]
    tensors = [value for value in values if _is_tensor(value)]
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(tensors) + len(numbers) != 2 or not tensors:  # a size of a tensor, say
        return importer._rsub(node) if name == "rsub" else importer._binary_op(op, plain)(node)
    given = [value.meta["val"] if hasattr(value, "meta") else value for value in node.args[:2]]
    dtype = str(torch.result_type(*given)).removeprefix("torch.")
    dtype = _dtype(node) if name == "div" else dtype
    a, b = (_cast(importer, value, dtype) for value in values)
    if name == "rsub":
        a, b = b, a
    if (alpha := node.kwargs.get("alpha", 1)) != 1:
        b = importer.block_builder.emit(relax.op.multiply(b, relax.const(alpha, dtype)))
    return importer.block_builder.emit(op(a, b))


def _whole_quotient(node: Any, importer: Any) -> Any:
    """Return ``a / b`` rounded down or towards 0; TVM's takes numbers for int32."""
    dtype = _dtype(node)
    a, b = (_cast(importer, value, dtype) for value in importer.retrieve_args(node)[:2])
    emit, rounding = importer.block_builder.emit, node.kwargs.get("rounding_mode", "floor")
    if rounding == "floor":
        return emit(relax.op.floor_divide(a, b))
    quotient = emit(relax.op.divide(a, b))
    return emit(relax.op.trunc(quotient)) if rounding and "float" in dtype else quotient


def _power(node: Any, importer: Any) -> Any:
    """Return ``x ** number``; TVM's rounds the number where x are integers."""
    x, exponent = importer.retrieve_args(node)
    if isinstance(exponent, float) and "float" not in str(x.ty.dtype):
        dtype = _dtype(node)
        power = relax.op.power(_cast(importer, x, dtype), relax.const(exponent, dtype))
        return importer.block_builder.emit(power)
    return importer._pow(node)


def _reciprocal(node: Any, importer: Any) -> Any:
    """Return ``1 / x``; of integers TVM's gives the whole part."""
    dtype = _dtype(node)
    x = _cast(importer, importer.env[node.args[0]], dtype)
    return importer.block_builder.emit(relax.op.divide(relax.const(1, dtype), x))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, relax.Expr) and isinstance(value.ty, relax.TensorType)


def _elu(node: Any, importer: Any) -> Any:
    """Return scale (max(x, 0) + alpha min(exp(input_scale x) - 1, 0)); TVM's knows only alpha."""
    x, *factors = importer.retrieve_args(node)
    alpha, scale, input_scale = (*factors, 1.0, 1.0, 1.0)[:3] if factors else (1.0, 1.0, 1.0)
    emit, dtype = importer.block_builder.emit, str(x.ty.dtype)

    def times(value: Any, factor: float) -> Any:
        return value if factor == 1 else emit(relax.op.multiply(value, relax.const(factor, dtype)))

    one, zero = relax.const(1, dtype), relax.const(0, dtype)
    below = emit(relax.op.subtract(emit(relax.op.exp(times(x, input_scale))), one))
    below = times(emit(relax.op.minimum(below, zero)), alpha)
    return times(emit(relax.op.add(emit(relax.op.nn.relu(x)), below)), scale)


def _from_front(importer: Any, index: Any, size: Any) -> Any:
    """Return indices of which negative ones, which count from the end, are replaced."""
    emit, dtype = importer.block_builder.emit, str(index.ty.dtype)
    if dtype == "bool":
        return index
    if isinstance(index, GenericConst):
        values = index.value.numpy()
        if (values >= 0).all():
            return index
        if isinstance(size, int) or hasattr(size, "value"):
            return relax.const(np.where(values < 0, values + int(size), values), dtype)
    sizes = _cast(importer, emit(relax.op.shape_to_tensor(relax.ShapeExpr([size]))), dtype)
    if not int(index.ty.ndim):
        sizes = emit(relax.op.squeeze(sizes, [0]))
    negative = emit(relax.op.less(index, relax.const(0, dtype)))
    return emit(relax.op.where(negative, emit(relax.op.add(index, sizes)), index))


def _select(node: Any, importer: Any) -> Any:
    """Return ``x.select(dim, index)``; TVM's reads before the tensor for a negative index."""
    x, dim, index = importer.env[node.args[0]], int(node.args[1]), node.args[2]
    if not isinstance(index, int):
        return importer._select(node)
    wanted = _from_front(importer, relax.const(index, "int64"), x.ty.shape.values[dim])
    return importer.block_builder.emit(relax.op.take(x, wanted, dim))


def _indexed(node: Any, importer: Any) -> Any:
    """Return ``x[indices]`` as NumPy and PyTorch do, None standing for whole dimensions.

    TVM's reads before the tensor where an index is negative, and takes indices of several
    dimensions for an outer product where others are left whole.
    """
    data, indices = importer.env[node.args[0]], node.args[1]
    emit, sizes = importer.block_builder.emit, data.ty.shape.values
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    found = [_from_front(importer, importer.env[indices[a]], sizes[a]) for a in axes]
    if len(axes) == 1:
        return emit(relax.op.take(data, found[0], axes[0]))
    taken = emit(relax.op.index_tensor(_with_axes_first(importer, data, axes), found))
    rank = max(int(index.ty.ndim) for index in found)
    return _permuted(importer, taken, _order_of_indexed(axes, rank, len(sizes) - len(axes)))


def _permuted(importer: Any, x: Any, order: list[int]) -> Any:
    if order == sorted(order):
        return x
    return importer.block_builder.emit(relax.op.permute_dims(x, order))


def _with_axes_first(importer: Any, x: Any, axes: list[int]) -> Any:
    """Return a tensor with these dimensions before those that are left whole."""
    whole = [axis for axis in range(int(x.ty.ndim)) if axis not in axes]
    return _permuted(importer, x, [*axes, *whole])


def _order_of_indexed(axes: list[int], rank: int, whole: int) -> list[int]:
    """Return where dimensions go that lie in the order of indices (``rank``), then whole ones.

    What the indices give stands where they stood, or in front if they stood apart.
    """
    first = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    order = [rank + i for i in range(whole)]
    order[first:first] = range(rank)
    return order


def _put(node: Any, importer: Any) -> Any:
    """Return x with ``x[indices] = values``, or ``+=``.

    TVM's reads beyond values that are to be broadcast, takes dimensions that are left whole for
    others where there are several, and adds to one place from several threads at once.
    """
    data, indices, values, accumulate = (*importer.retrieve_args(node), False)[:4]
    emit, sizes = importer.block_builder.emit, data.ty.shape.values
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    found = [indices[axis] for axis in axes]
    if any(str(index.ty.dtype) == "bool" for index in found):
        return _put_masked(importer, data, indices, values, accumulate)
    found = [_cast(importer, _from_front(importer, indices[a], sizes[a]), "int64") for a in axes]
    front = _with_axes_first(importer, data, axes)
    shape = emit(relax.op.index_tensor(front, found)).ty.shape.values  # only its shape is used
    rank, whole = max(int(index.ty.ndim) for index in found), len(sizes) - len(axes)
    places = [emit(relax.op.broadcast_to(index, shape[:rank])) for index in found]
    place = emit(relax.op.concat([emit(relax.op.expand_dims(p, [rank])) for p in places], rank))
    order = _order_of_indexed(axes, rank, whole)
    values = emit(relax.op.broadcast_to(values, [shape[axis] for axis in order]))
    values = _permuted(importer, values, _inverse(order))
    if not rank:
        place, values = (emit(relax.op.expand_dims(value, [0])) for value in (place, values))
    how = "add" if accumulate else "update"
    written = emit(relax.op.scatter_nd(front, place, values, how))
    order = [*axes, *(axis for axis in range(len(sizes)) if axis not in axes)]
    return _permuted(importer, written, _inverse(order))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _put_masked(importer: Any, data: Any, indices: Any, values: Any, accumulate: bool) -> Any:
    """Return x with ``x[mask] = value``, for one value."""
    (mask, *others), rank = indices, int(data.ty.ndim)
    if others or any(int(size) != 1 for size in values.ty.shape.values):
        raise NotImplementedError("a mask that several values are put at; use torch.where")
    emit = importer.block_builder.emit
    ones = [1] * (rank - int(mask.ty.ndim))
    mask = emit(relax.op.reshape(mask, [*mask.ty.shape.values, *ones]))
    value = emit(relax.op.reshape(values, [1] * rank))
    if accumulate:
        value = emit(relax.op.add(data, value))
    return emit(relax.op.where(mask, value, data))


def _nearest(node: Any, importer: Any) -> Any:
    """Resize to the nearest neighbours by PyTorch's rule: the floor of the scaled position."""
    x, size, factors = (*importer.retrieve_args(node), None)[:3]
    height, width = (int(dim) for dim in x.ty.shape.values[2:])
    if not size:
        size = [int(height * factors[0]), int(width * factors[1])]
        if [n / f for n, f in zip(size, factors, strict=True)] != [height, width]:
            raise NotImplementedError("a scale factor that gives no whole size; give the size")
    return importer.block_builder.emit(
        relax.op.image.resize2d(
            x,
            tuple(int(n) for n in size),
            layout="NCHW",
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        )
    )


def _grid_sample(node: Any, importer: Any) -> Any:
    """Sample at a grid (N, H, W, 2); TVM's takes it for one that lies as (N, 2, H, W)."""
    data, grid, *options = importer.retrieve_args(node)
    mode, padding, corners = (*options, 0, 0, False)[:3] if options else (0, 0, False)
    grid = importer.block_builder.emit(relax.op.permute_dims(grid, [0, 3, 1, 2]))
    return importer.block_builder.emit(
        relax.op.image.grid_sample(
            data,
            grid,
            method=("bilinear", "nearest", "bicubic")[mode],
            layout="NCHW",
            padding_mode=("zeros", "border", "reflection")[padding],
            align_corners=bool(corners),
        )
    )


_ELEMENTWISE = {
    "add": (relax.op.add, operator.add),
    "sub": (relax.op.subtract, operator.sub),
    "rsub": (relax.op.subtract, operator.sub),
    "mul": (relax.op.multiply, operator.mul),
    "div": (relax.op.divide, operator.truediv),
    "remainder": (relax.op.floor_mod, operator.mod),
    "fmod": (relax.op.mod, math.fmod),
    "eq": (relax.op.equal, operator.eq),
    "ne": (relax.op.not_equal, operator.ne),
    "ge": (relax.op.greater_equal, operator.ge),
    "gt": (relax.op.greater, operator.gt),
    "le": (relax.op.less_equal, operator.le),
    "lt": (relax.op.less, operator.lt),
}

# Of products, TVM's own converters always return float32, and then refuse to add a float16 bias.
CONVERTERS = {
    "mm.default": _product,
    "bmm.default": _product,
    "addmm.default": _product_plus,
    **{f"{name}.{kind}": _elementwise for name in _ELEMENTWISE for kind in ("Tensor", "Scalar")},
    "div.Tensor_mode": _whole_quotient,
    "div.Scalar_mode": _whole_quotient,
    "floor_divide.default": _whole_quotient,
    "pow.Tensor_Scalar": _power,
    "reciprocal.default": _reciprocal,
    "elu.default": _elu,
    "select.int": _select,
    "index.Tensor": _indexed,
    "index_put.default": _put,
    "upsample_nearest2d.vec": _nearest,
    "grid_sampler_2d.default": _grid_sample,
}
"""Operator of ATen -> its converter."""


def relax_module(program: Any) -> Any:
    """Import an exported program; the module's ``main`` takes the inputs, then the parameters.

    Raises:
        Exception: whatever the converters of TVM raise.
    """
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    class Importer(ExportedProgramImporter):
        """TVM's, which forgets the converters of others in the branches of `torch.cond`."""

        def _translate_fx_graph(
            self, graph_module: Any, nodes: Any, inputs_vars: Any, custom_ops: Any = None
        ) -> Any:
            return super()._translate_fx_graph(graph_module, nodes, inputs_vars, set(CONVERTERS))

    return Importer().from_exported_program(
        program,
        keep_params_as_input=True,
        unwrap_unit_return_tuple=True,
        no_bind_return_tuple=False,
        custom_convert_map=CONVERTERS,
    )


def wrong_dtype(program: Any, returned: Any) -> str | None:
    """Tell of an output that has another dtype than in PyTorch; None where all are right."""
    types = list(returned.fields) if isinstance(returned, relax.TupleType) else [returned]
    nodes = program.graph.output_node().args[0]
    for number, (ours, node) in enumerate(zip(types, nodes, strict=False)):
        value = getattr(node, "meta", {}).get("val")  # outputs may be None or numbers
        theirs = str(getattr(value, "dtype", "")).removeprefix("torch.")
        if theirs and isinstance(ours, relax.TensorType) and str(ours.dtype) != theirs:
            return f"output {number} as {ours.dtype} instead of {theirs}"
    return None
