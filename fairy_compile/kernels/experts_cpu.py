"""Mixtures of experts on CPUs: routing, sorting rows by expert, and products with chosen experts.

The packed weights of all experts of a layer lie in one array each, experts first. Rows that chose
the same expert are brought together, so that an expert's codes are read once for all of them, and
those of an expert that nobody chose not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.attention_cpu_pages import parallel_tokens
from fairy_compile.kernels.attention_cpu_vector import store
from fairy_compile.kernels.base import Batch

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import PrimFunc, Stmt

_LOWEST = -3.4e38


def build_route(experts: int, chosen: int, normalize: bool, batch: Batch) -> PrimFunc:
    """Return ``route``: which experts a token goes to, and with which weights.

    Arguments: logits float32 (n, experts), weights float32 (n, chosen), ids int32 (n, chosen).
    Weights are the largest probabilities of a softmax over all experts, in descending order, and
    sum to 1 if ``normalize`` (Mixtral, arXiv 2401.04088, section 2.1). Of equal ones the first
    comes first. Ids lie in range whatever the logits.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("route")
        _attributes()
        rows = _rows(batch)
        logits = T.arg("logits", T.buffer((rows, experts), "float32"))
        weights = T.arg("weights", T.buffer((rows, chosen), "float32"))
        ids = T.arg("ids", T.buffer((rows, chosen), "int32"))

        def route(row: Expr | int) -> None:
            left = T.alloc_buffer((experts,), "float32")
            best = T.alloc_buffer((2,), "float32")  # the largest logit, sum of all exponentials
            place = T.alloc_buffer((1,), "int32")
            kept = T.alloc_buffer((1,), "float32")
            store(best, 0, T.float32(_LOWEST))
            with T.serial(0, experts) as e:
                store(left, e, logits[row, e])
                store(best, 0, T.max(best[0], logits[row, e]))
            store(best, 1, T.float32(0))
            with T.serial(0, experts) as e:
                store(best, 1, best[1] + T.exp(left[e] - best[0]))
            store(kept, 0, T.float32(0))
            with T.serial(0, chosen) as k:
                store(place, 0, T.int32(0))
                with T.serial(1, experts) as e, T.If(left[e] > left[place[0]]), T.Then():
                    store(place, 0, e)
                weight = T.bind(T.exp(left[place[0]] - best[0]) / best[1])
                store(ids, (row, k), place[0])
                store(weights, (row, k), weight)
                store(kept, 0, kept[0] + weight)
                store(left, place[0], T.float32(_LOWEST))
            if normalize:
                with T.serial(0, chosen) as k:
                    store(weights, (row, k), weights[row, k] / kept[0])

        with T.sblock("root"):
            if batch == "single":
                route(0)
            else:
                parallel_tokens(rows, route)
    return ir.get().without_attr("global_symbol")


def build_group(experts: int, chosen: int, batch: Batch) -> PrimFunc:
    """Return ``group``: the order of all (token, choice) pairs by expert.

    Arguments: ids int32 (n, chosen), starts int32 (experts + 1,), order int32 (n * chosen,), places
    int32 (n, chosen). Pair ``token * chosen + choice`` stands at ``places[token, choice]``, where
    ``order`` has its number; expert e has places ``starts[e]`` to ``starts[e + 1] - 1``. Pairs of
    an expert keep their order.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("group")
        _attributes()
        rows = _rows(batch)
        ids = T.arg("ids", T.buffer((rows, chosen), "int32"))
        starts = T.arg("starts", T.buffer((experts + 1,), "int32"))
        order = T.arg("order", T.buffer((rows * chosen,), "int32"))
        places = T.arg("places", T.buffer((rows, chosen), "int32"))
        with T.sblock("root"):
            free = T.alloc_buffer((experts,), "int32")
            with T.serial(0, experts + 1) as e:
                store(starts, e, T.int32(0))
            with T.serial(0, rows) as row, T.serial(0, chosen) as k:
                after = T.bind(ids[row, k] + 1)
                store(starts, after, starts[after] + 1)
            with T.serial(0, experts) as e:
                store(free, e, starts[e])
                store(starts, e + 1, starts[e + 1] + starts[e])
            with T.serial(0, rows) as row, T.serial(0, chosen) as k:
                expert = T.bind(ids[row, k])
                place = T.bind(free[expert])
                store(free, expert, place + 1)
                store(places, (row, k), place)
                store(order, place, T.cast(row, "int32") * chosen + k)
    return ir.get().without_attr("global_symbol")


def build_grouped(experts: int, rows: int | None, single: PrimFunc, many: PrimFunc) -> PrimFunc:
    """Return ``grouped``: products of rows with the weights of the experts they stand with.

    Arguments: x (r, in), starts int32 (experts + 1,) as `build_group` gives it, the arrays of
    ``single`` with experts as a first dimension, y (r, out).

    Args:
        experts: how many there are.
        rows: r, or None for a symbolic number. Where it is known, rows are few, and each is
            computed by ``single``.
        single: function (x (1, in), *arrays, y (1, out)) of one row and one expert.
        many: the same for a symbolic number of rows; used for experts with more than one.
    """
    x_one, *array_types, y_one = (param.ty for param in single.params)
    count_rows = tirx.Var("rows", "int64") if rows is None else rows
    x = _buffer("x", (count_rows, x_one.shape[1]), x_one.dtype)
    starts = _buffer("starts", (experts + 1,), "int32")
    names = [param.name for param in single.params[1:-1]]
    arrays = [
        _buffer(name, (experts, *ty.shape), ty.dtype)
        for name, ty in zip(names, array_types, strict=True)
    ]
    y = _buffer("y", (count_rows, y_one.shape[1]), y_one.dtype)
    buffers = [x, *arrays, y]
    expert, row = tirx.Var("expert", "int32"), tirx.Var("row", "int32")
    first, after = (tirx.BufferLoad(starts, [expert + i]) for i in (0, 1))
    if rows is None:
        several = _over(many, buffers, expert, first, after - first)
        body = tirx.IfThenElse(
            after - first == 1,
            _over(single, buffers, expert, first),
            tirx.IfThenElse(after - first > 1, several, None),
        )
    else:
        body = _loop(row, after - first, _over(single, buffers, expert, first + row))
    body = _loop(expert, tirx.IntImm("int32", experts), body)
    attributes = {"tirx.is_scheduled": True, "tirx.noalias": True}
    function = tirx.PrimFunc([x, starts, *arrays, y], body)
    return function.with_attr({**attributes, "s_tir": True})


def _over(
    function: PrimFunc, buffers: Sequence[Any], expert: Expr, first: Expr, count: Expr | None = None
) -> Stmt:
    """Return the body of ``function`` over ``count`` rows and the arrays of one expert.

    Args:
        function: (x, *arrays, y).
        buffers: what stands for its parameters.
        expert: index into the arrays.
        first: the first row.
        count: number of rows, where ``function`` leaves it open.
    """
    function = _without_blocks(function)
    x, *_, y = buffers
    replaced = dict(zip(function.params, buffers, strict=True))
    scratch = {}
    if count is not None:
        tokens = function.params[0].ty.shape[0]
        scratch = _scratch_for_all(function.body, tokens, x.ty.shape[0])

    def place(buffer: Any, indices: Sequence[Any]) -> tuple[Any, list[Any]]:
        if buffer in scratch:
            return scratch[buffer], list(indices)
        new = replaced[buffer]
        if new is x or new is y:
            row = indices[0] + tirx.Cast(_dtype(indices[0]), first)
            return new, [row, *indices[1:]]
        return new, [expert, *indices]

    def load(node: Any) -> Any:
        if node.source not in replaced and node.source not in scratch:
            return node
        return tirx.BufferLoad(*place(node.source, node.indices))

    def write(node: Any) -> Any:
        if node.buffer not in replaced and node.buffer not in scratch:
            return node
        new, indices = place(node.buffer, node.indices)
        return tirx.BufferStore(new, node.value, indices)

    def allocate(node: Any) -> Any:
        if node.buffer not in scratch:
            return node
        return tirx.AllocBuffer(scratch[node.buffer], node.annotations)

    body = tvm_ffi.structural_map(
        function.body,
        [(tvm.ir.expr.TensorLoad, load), (tirx.BufferStore, write), (tirx.AllocBuffer, allocate)],
        order="post",
    )
    if count is None:
        return body
    return tirx.SeqStmt([tirx.Bind(tokens, tirx.Cast(_dtype(tokens), count)), body])


def _scratch_for_all(body: Stmt, tokens: Any, rows: Expr) -> dict[Any, Any]:
    """Return scratch buffer -> one as large as the rows of all experts ask for.

    TVM moves allocations out of the loop over experts, to where the number of rows of one of them
    is not known yet. Sizes grow with it, and in the first dimension, so that indices stay.
    """
    bound: dict[Any, Any] = {}
    buffers: list[Any] = []

    def widest(size: Any) -> Any:
        def known(var: Any) -> Any:
            if var.same_as(tokens):
                return tirx.Cast(_dtype(var), rows) if _dtype(var) != _dtype(rows) else rows
            return widest(bound[var]) if var in bound else var

        return tvm_ffi.structural_map(size, [(tvm.ir.expr.Var, known)], order="post")

    def bind(node: Any, visitor: Any) -> None:
        bound[node.var] = node.value
        visitor.default_visit(node)

    def allocate(node: Any, visitor: Any) -> None:
        if any(not isinstance(size, tirx.IntImm | int) for size in node.buffer.ty.shape):
            buffers.append(node.buffer)

    tvm_ffi.structural_visit(body, [(tirx.Bind, bind), (tirx.AllocBuffer, allocate)])
    return {
        buffer: tirx.decl_buffer(
            [widest(size) for size in buffer.ty.shape], buffer.ty.dtype, buffer.name
        )
        for buffer in buffers
    }


def _without_blocks(function: PrimFunc) -> PrimFunc:
    """Return a scheduled function as loops, loads and stores."""
    blocks: list[Any] = []
    tvm_ffi.structural_visit(function.body, [(tvm.s_tir.SBlock, lambda b, _: blocks.append(b))])
    if not blocks:
        return function
    passes = tvm.s_tir.transform
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    lower = tvm.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
            passes.LowerMatchBuffer(),
            passes.LowerOpaqueBlock(),
        ]
    )
    return lower(module)["main"]


def _buffer(name: str, shape: Sequence[Any], dtype: str) -> Any:
    return tirx.decl_buffer(tuple(shape), dtype, name)


def _dtype(expr: Any) -> str:
    return str(expr.ty.dtype) if hasattr(expr, "ty") else str(expr.dtype)


def _loop(var: Any, extent: Any, body: Stmt) -> Stmt:
    return tirx.For(var, tirx.IntImm("int32", 0), extent, tirx.ForKind.SERIAL, body)


def _attributes() -> None:
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})


def _rows(batch: Batch) -> Expr | int:
    return 1 if batch == "single" else T.int64()
