"""The dense kernel on GPUs: y = x W^T for layers that stay real, experts of a mixture too.

Weights are stored in the dtype of activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.gpu_builder import (
    build_function,
    ceildiv,
    launch,
    launch_if,
    load_float,
    local,
    reduce_group,
    store,
    when,
)
from fairy_compile.kernels.gpu_rows import (
    AllRows,
    ChosenRows,
    LedRows,
    OneRow,
    PackedRows,
    Rows,
    Stacked,
)
from fairy_compile.kernels.gpu_tile import DEPTH, GROUP, OUTPUTS, TileGemm, tile_dtype

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

    from fairy_compile.models.linear import LinearCall
    from fairy_compile.targets import Limits

_THREADS, _TEAMS = 32, 4
_VECTOR = 4
# Rows of x from which on the tiled kernel is the faster one.
_SWITCH = 4


def build_dense(call: LinearCall, limits: Limits | None, batch: Batch) -> PrimFunc:
    """Return a scheduled function (x, weight, y).

    x is ``call.act_dtype`` (b, in_features), weight ``call.dtype`` (out_features, in_features), y
    ``call.out_dtype`` (b, out_features); sums are float32.
    """
    features, size = sum(call.out_features), call.in_features

    def body() -> None:
        rows: Any = 1 if batch == "single" else T.int32()
        x = T.arg("x", T.buffer((rows, size), call.act_dtype))
        weight = T.arg("weight", T.buffer((features, size), call.dtype))
        y = T.arg("y", T.buffer((rows, features), call.out_dtype))
        if batch == "single":
            _dot(x, weight, y, AllRows(rows))
            return
        with launch_if(rows <= _SWITCH):
            _dot(x, weight, y, AllRows(rows))
        with launch_if(rows > _SWITCH):
            _tiled(x, weight, y, call).emit(x, AllRows(rows))

    return build_function("dense", body).without_attr("global_symbol")


def build_chosen(call: LinearCall, chosen: int, x_rows: int) -> PrimFunc:
    """Return a scheduled function (x, ids, weight, y) for one token and the experts it chose.

    x is (x_rows, in_features), 1 row for all choices or ``chosen``, one each; ids int32 (1,
    chosen); weight (experts, out_features, in_features); y (chosen, out_features). Dtypes and sums
    are those of `build_dense`.
    """

    def body() -> None:
        x = T.arg("x", T.buffer((x_rows, call.in_features), call.act_dtype))
        ids = T.arg("ids", T.buffer((1, chosen), "int32"))
        weight = _stacked(call)
        y = T.arg("y", T.buffer((chosen, sum(call.out_features)), call.out_dtype))
        _dot(x if x_rows == chosen else OneRow(x), weight, y, ChosenRows(ids, [weight]))

    return build_function("dense_chosen", body).without_attr("global_symbol")


def build_grouped(call: LinearCall) -> PrimFunc:
    """Return a scheduled function (x, starts, weight, y) for rows sorted by expert.

    x is (r, in_features), starts int32 (experts + 1,) as `experts_cpu.build_group` gives it, weight
    (experts, out_features, in_features), y (r, out_features). Dtypes and sums are those of
    `build_dense`.
    """
    switch = _SWITCH * call.experts

    def body() -> None:
        rows: Any = T.int32()
        x = T.arg("x", T.buffer((rows, call.in_features), call.act_dtype))
        starts = T.arg("starts", T.buffer((call.experts + 1,), "int32"))
        weight = _stacked(call)
        y = T.arg("y", T.buffer((rows, sum(call.out_features)), call.out_dtype))
        arguments = (x, starts, weight.buffer, y)
        with launch_if(rows <= switch):
            _dot(x, weight, y, LedRows(rows, starts, [weight], arguments))
        with launch_if(rows > switch):
            _tiled(x, weight, y, call).emit(x, PackedRows(rows, starts, [weight], arguments))

    return build_function("dense_grouped", body).without_attr("global_symbol")


def _stacked(call: LinearCall) -> Stacked:
    """Declare the weights of all experts as an argument."""
    shape = (call.experts, sum(call.out_features), call.in_features)
    return Stacked(T.arg("weight", T.buffer(shape, call.dtype)))


def _dot(x: Buffer | OneRow, weight: Buffer | Stacked, y: Buffer, rows: Rows) -> None:
    """A team of threads for every output feature and row of x."""
    features, size = (int(d) for d in weight.shape)
    lanes = next(lanes for lanes in (_VECTOR, 2, 1) if size % lanes == 0)
    extents = {
        "blockIdx.y": rows.groups(1),
        "blockIdx.x": -(-features // _TEAMS),
        "threadIdx.y": _TEAMS,
        "threadIdx.x": _THREADS,
    }
    with launch(extents, rows.arguments) as (group, block, team, thread):
        token = rows.tile(group, 1).first
        feature = T.bind(block * _TEAMS + team)
        row = T.bind(T.min(feature, features - 1))
        total, values, weights = local((1,)), local((lanes,)), local((lanes,))
        store(total, 0, T.float32(0))
        with T.serial(0, ceildiv(size // lanes, _THREADS)) as turn:
            step = T.bind(turn * _THREADS + thread)
            with when(step < size // lanes):
                _load(values, x, token, step, lanes)
                _load(weights, weight, row, step, lanes)
                for i in range(lanes):
                    store(total, 0, total[0] + values[i] * weights[i])
        sums = reduce_group(
            [total[0]], lambda a, b: a + b, thread, _THREADS, team=team, teams=_TEAMS
        )
        with when(T.And(thread == 0, feature < features)):
            store(y, (token, feature), T.cast(sums[0], str(y.dtype)))


def _load(
    into: Buffer, source: Buffer | OneRow | Stacked, row: Any, step: Expr, lanes: int
) -> None:
    if lanes == 1:
        store(into, 0, load_float(source, row, step))
        return
    value = source[row, T.ramp(step * lanes, 1, lanes)]
    if str(source.dtype) != "float32":
        value = T.cast(value, f"float32x{lanes}")
    store(into, T.ramp(0, 1, lanes), value)


def _tiled(x: Buffer, weight: Buffer | Stacked, y: Buffer, call: LinearCall) -> TileGemm:
    features, size = (int(d) for d in weight.shape)
    dtype = tile_dtype(call.act_dtype)

    def fill_weight(tile: Buffer, block: Expr, step: Expr, thread: Expr) -> None:
        for turn in range(OUTPUTS * DEPTH // GROUP):
            at = T.bind(thread + turn * GROUP)
            j, d = T.bind(T.floordiv(at, DEPTH)), T.bind(T.floormod(at, DEPTH))
            row = T.min(block * OUTPUTS + j, features - 1)
            value = weight[row, T.min(step * DEPTH + d, size - 1)]
            store(tile, (d, j), value if call.dtype == dtype else T.cast(value, dtype))

    def x_column(step: Expr, depth: Expr) -> tuple[Expr, Any]:
        first = T.bind(step * DEPTH + depth)
        return first, None if size % DEPTH == 0 else (lambda c: first + c < size)

    def write(token: Expr, block: Expr, j: Expr, value: Expr) -> None:
        feature = T.bind(block * OUTPUTS + j)
        with when(feature < features):
            store(y, (token, feature), T.cast(value, call.out_dtype))

    return TileGemm(
        outputs=-(-features // OUTPUTS),
        steps=-(-size // DEPTH),
        tokens=64 if dtype == "float16" else 32,
        dtype=dtype,
        fill_weight=fill_weight,
        x_column=x_column,
        write=write,
    )
