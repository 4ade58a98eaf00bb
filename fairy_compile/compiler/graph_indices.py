"""Look-ups and scatters of an imported graph that never leave their arrays.

Indices such as token ids come from whoever calls the library, and TVM's operators trust them. Here
a look-up outside of its array gives NaN (the nearest element, where elements are no floats), and
what would be written outside is left out. Negative indices count from the end only where the
operator says so; the importers have put those of other operators right already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import relax, te, tirx, topi
from tvm.relax import BlockBuilder


def guard_indices(builder: BlockBuilder, call: relax.Call, target_is_gpu: bool) -> Any:
    """Return a call that reads and writes inside of its arrays alone; others as they are."""
    name = getattr(call.op, "name", "").removeprefix("relax.")
    if name == "take":
        return _take(call)
    if name not in _GUARDED or not _shapes_known(call):
        return call
    return _GUARDED[name](builder, call, target_is_gpu)


def _shapes_known(call: relax.Call) -> bool:
    """Tell whether the ranks of all operands are known; TVM compiles no other call either."""
    types = [
        field
        for arg in call.args
        for field in (arg.ty.fields if isinstance(arg.ty, tvm.ir.TupleType) else [arg.ty])
    ]
    return all(getattr(getattr(ty, "shape", None), "values", None) is not None for ty in types)


def _take(call: relax.Call) -> relax.Call:
    if str(call.attrs.mode) != "fast":
        return call
    axis = call.attrs.axis
    table, indices = call.args
    mode = "nan" if "float" in str(table.ty.dtype) else "clip"
    return relax.op.take(table, indices, None if axis is None else int(axis), mode)


def _read(data: te.Tensor, position: Sequence[Any], checked: Sequence[int]) -> Any:
    """Return an element of which the indices of the ``checked`` axes may be any numbers."""
    position = [tirx.Cast("int64", p) if a in checked else p for a, p in enumerate(position)]
    if "float" in str(data.dtype):
        inside = _inside([(position[a], data.shape[a]) for a in checked])
        return tirx.if_then_else(inside, data(*position), tirx.const(float("nan"), data.dtype))
    for axis in checked:
        last = tirx.Cast("int64", data.shape[axis]) - 1
        position[axis] = tirx.max(tirx.min(position[axis], last), tirx.const(0, "int64"))
    holds = tirx.all(*(data.shape[a] > 0 for a in checked))
    return tirx.if_then_else(holds, data(*position), tirx.const(0, data.dtype))


def _inside(indices: Sequence[tuple[Any, Any]]) -> Any:
    """Return whether every (index, size) lies within 0 and size - 1."""
    return tirx.all(*(test for index, size in indices for test in (index >= 0, index < size)))


def _gather_elements(builder: BlockBuilder, call: relax.Call, target_is_gpu: bool) -> relax.Call:
    def compute(data: te.Tensor, indices: te.Tensor, axis: int) -> te.Tensor:
        def element(*at: Any) -> Any:
            return _read(data, [*at[:axis], indices(*at), *at[axis + 1 :]], [axis])

        return te.compute(indices.shape, element, name="gather_elements")

    axis = int(call.attrs.axis) % int(call.args[0].ty.ndim)
    return builder.call_te(compute, *call.args, axis)


def _gather_nd(builder: BlockBuilder, call: relax.Call, target_is_gpu: bool) -> relax.Call:
    def compute(data: te.Tensor, indices: te.Tensor, batch: int) -> te.Tensor:
        rank, depth = len(indices.shape) - 1, int(indices.shape[-1])

        def element(*at: Any) -> Any:
            found = [indices(*at[:rank], axis) for axis in range(depth)]
            position = [*at[:batch], *found, *at[rank:]]
            return _read(data, position, range(batch, batch + depth))

        shape = [*list(indices.shape)[:-1], *list(data.shape)[batch + depth :]]
        return te.compute(shape, element, name="gather_nd")

    if not isinstance(call.args[1].ty.shape.values[-1], int | tirx.IntImm):
        return call  # which TVM does not compile
    return builder.call_te(compute, *call.args, int(call.attrs.batch_dims))


def _index_tensor(builder: BlockBuilder, call: relax.Call, target_is_gpu: bool) -> relax.Call:
    data, indices = call.args
    count = len(indices.ty.fields)
    fields = [builder.emit(relax.TupleGetItem(indices, i)) for i in range(count)]
    if any(str(field.ty.dtype) == "bool" for field in fields):
        return call
    shape = list(call.ty.shape.values)

    def compute(data: te.Tensor, *indices: te.Tensor) -> te.Tensor:
        rank = len(shape) - len(data.shape) + count

        def element(*at: Any) -> Any:
            found = [_broadcast(index, at[:rank]) for index in indices]
            return _read(data, [*found, *at[rank:]], range(count))

        return te.compute(shape, element, name="index_tensor")

    return builder.call_te(compute, data, *fields)


def _broadcast(tensor: te.Tensor, at: Sequence[Any]) -> Any:
    """Return the element of a tensor that stands at a position of what it is broadcast to."""
    own = list(at)[len(at) - len(tensor.shape) :]
    ones = [isinstance(size, int | tirx.IntImm) and int(size) == 1 for size in tensor.shape]
    return tensor(*(0 if one else place for one, place in zip(ones, own, strict=True)))


def _scatter(
    data: te.Tensor,
    indices: te.Tensor,
    updates: te.Tensor,
    axes: Sequence[int],
    scatter: Callable[[te.Tensor, te.Tensor, te.Tensor], te.Tensor],
) -> te.Tensor:
    """Scatter into a copy that is longer by one along the first of ``axes``, and drop its end.

    Writes that would leave the array go there, whatever reduction they are part of.

    Args:
        data: what is written into.
        indices: of which the last dimension holds an index of each of ``axes``.
        updates: what is written.
        axes: those that are indexed.
        scatter: the operator.
    """
    first, sizes = axes[0], list(data.shape)
    longer = [size + (axis == first) for axis, size in enumerate(sizes)]

    def padded(*at: Any) -> Any:
        return tirx.if_then_else(at[first] < sizes[first], data(*at), tirx.const(0, data.dtype))

    def settled(*at: Any) -> Any:
        found = [tirx.Cast("int64", indices(*at[:-1], i)) for i in range(len(axes))]
        inside = _inside([(index, sizes[axis]) for index, axis in zip(found, axes, strict=True)])
        value: Any = tirx.const(0, "int64")
        for number, index in reversed(list(enumerate(found))):
            beyond = tirx.Cast("int64", sizes[first]) if number == 0 else tirx.const(0, "int64")
            value = tirx.Select(at[-1] == number, tirx.Select(inside, index, beyond), value)
        return value

    written = scatter(
        te.compute(longer, padded, name="padded"),
        te.compute(indices.shape, settled, name="settled"),
        updates,
    )
    return te.compute(sizes, lambda *at: written(*at), name="scattered")


def _scatter_nd(builder: BlockBuilder, call: relax.Call, target_is_gpu: bool) -> relax.Call:
    if not isinstance(call.args[1].ty.shape.values[-1], int | tirx.IntImm):
        return call  # which TVM does not compile
    if not int(call.args[1].ty.shape.values[-1]):
        return call  # no index at all
    scatter = _scatter_nd_of(str(call.attrs.reduction), target_is_gpu)

    def compute(data: te.Tensor, indices: te.Tensor, updates: te.Tensor) -> te.Tensor:
        return _scatter(data, indices, updates, range(int(indices.shape[-1])), scatter)

    return builder.call_te(compute, *call.args)


def _scatter_nd_of(reduction: str, target_is_gpu: bool) -> Callable[..., te.Tensor]:
    operator = topi.gpu.scatter_nd if target_is_gpu else topi.scatter_nd

    def scatter(data: te.Tensor, indices: te.Tensor, updates: te.Tensor) -> te.Tensor:
        rank = len(indices.shape)
        turned = topi.transpose(indices, [rank - 1, *range(rank - 1)])
        return operator(data, turned, updates, reduction)

    return scatter


def _scatter_elements(builder: BlockBuilder, call: relax.Call, target_is_gpu: bool) -> relax.Call:
    """Write every update to the position that its own and its index tell.

    TVM's operator takes indices that are smaller than the data, along other axes than the one they
    index, for some of another order.
    """
    axis = int(call.attrs.axis) % int(call.args[0].ty.ndim)
    scatter = _scatter_nd_of(str(call.attrs.reduction), target_is_gpu)

    def compute(data: te.Tensor, indices: te.Tensor, updates: te.Tensor) -> te.Tensor:
        rank = len(data.shape)

        def position(*at: Any) -> Any:
            index = tirx.Cast("int64", indices(*at[:-1]))
            size = tirx.Cast("int64", data.shape[axis])
            value = tirx.Select(index < 0, index + size, index)  # negative ones count from the end
            for other in (other for other in range(rank) if other != axis):
                own = tirx.Cast("int64", at[other])
                value = tirx.Select(at[-1] == other, own, value)
            return value

        positions = te.compute([*indices.shape, rank], position, name="positions")
        shaped = te.compute(indices.shape, lambda *at: updates(*at), name="shaped")
        return _scatter(data, positions, shaped, range(rank), scatter)

    return builder.call_te(compute, *call.args)


_GUARDED = {
    "gather_elements": _gather_elements,
    "gather_nd": _gather_nd,
    "index_tensor": _index_tensor,
    "scatter_nd": _scatter_nd,
    "scatter_elements": _scatter_elements,
}
