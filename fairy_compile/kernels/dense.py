"""The dense kernel: y = x W^T for the layers that stay real (odd sizes, exempt layers, tied heads).

Weights keep the dtype they are stored in (float32, float16, bfloat16) and are widened in registers.
"""

from __future__ import annotations

from typing import Any

from fairy_compile.kernels.base import Batch

NAME = "dense"
LAYOUT = "rows"
LANES = 16
ROWS_PER_TASK = 8


def build_dense(out_features: int, in_features: int, dtype: str, batch: Batch) -> Any:
    """Return a scheduled CPU function (x, weight, y).

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: storage dtype of the weight.
        batch: ``single`` for one row, ``many`` for a symbolic number.

    Returns:
        PrimFunc over x float32 (b, in_features), weight ``dtype`` (out_features, in_features) and
        y float32 (b, out_features). Sums are float32, in ``LANES`` partial sums where the row
        length allows.
    """
    from tvm import te, tirx
    from tvm.s_tir import Schedule

    rows = 1 if batch == "single" else tirx.Var("b", "int64")
    x = te.placeholder((rows, in_features), "float32", name="x")
    weight = te.placeholder((out_features, in_features), dtype, name="weight")
    k = te.reduce_axis((0, in_features), "k")
    y = te.compute(
        (rows, out_features),
        lambda b, j: te.sum(x[b, k] * tirx.Cast("float32", weight[j, k]), axis=k),
        name="y",
    )
    sch = Schedule(te.create_prim_func([x, weight, y]))
    _schedule_dot(sch, in_features)
    func = sch.mod["main"].without_attr("global_symbol")
    return func.with_attr({"tirx.noalias": True, "tirx.is_scheduled": True})


def _schedule_dot(sch: Any, length: int) -> None:
    """Parallel over blocks of output rows; dot products in vector partial sums."""
    lanes = next(width for width in (LANES, 8, 4, 2, 1) if length % width == 0)
    y = sch.get_sblock("y")
    _, _, k = sch.get_loops(y)
    if lanes > 1:
        _, vector = sch.split(k, [None, lanes])
        partial = sch.rfactor(vector, factor_axis=2)
    b, j, *_ = sch.get_loops(y)
    outer, inner = sch.split(j, [None, ROWS_PER_TASK])
    sch.reorder(outer, inner, b)
    sch.parallel(outer)
    if lanes > 1:
        sch.compute_at(partial, b, preserve_unit_loops=True)
        vector, _, _, k = sch.get_loops(partial)[-4:]
        sch.reorder(k, vector)
        sch.vectorize(vector)
        init = sch.decompose_reduction(partial, k)
        sch.vectorize(sch.get_loops(init)[-1])
