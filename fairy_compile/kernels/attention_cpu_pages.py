"""Moving keys and values in the paged cache, and merging partial attention, on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_decode import index_buffer
from fairy_compile.kernels.attention_cpu_tile import TILE, log_sum_exp_weights
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, span, splat, store
from fairy_compile.kernels.attention_shape import AttentionShape

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

# Fewer tokens than this are not worth waking other threads for.
PARALLEL_TOKENS = 8


def build_append(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``kv_cache_transpose_append``: new keys and values into their pages.

    Arguments: pages, k_data and v_data (n, kv_heads, head_dim), position_map int32 (n,): page * 16
    + row of each token, or -1 for tokens that are not kept.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("kv_cache_append")
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        tokens = T.int64()
        pages = _pages_arg(shape)
        data = [
            T.arg(name, T.buffer((tokens, shape.kv_heads, shape.head_dim), shape.dtype))
            for name in ("k_data", "v_data")
        ]
        positions = T.arg("position_map", index_buffer(tokens))

        def append(token: Expr) -> None:
            position = T.bind(positions[token])
            with T.If(position >= 0), T.Then():
                page, row = _page_and_row(position)
                with T.serial(0, shape.kv_heads) as head:
                    for half, rows in enumerate(data):
                        _copy_row(shape, unit, rows, (token, head), pages, (page, half, head, row))

        parallel_tokens(tokens, append)
    return ir.get()


def build_copy_page(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``copy_single_page``: the first rows of a page into another.

    Arguments: pages, source and target page int64, rows to copy int64.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("kv_cache_copy_page")
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        pages = _pages_arg(shape)
        source, target, count = (T.arg(n, T.int64()) for n in ("source", "target", "count"))
        with T.serial(0, 2) as half, T.serial(0, shape.kv_heads) as head, T.serial(0, count) as row:
            at = (half, head, row)
            _copy_row(shape, unit, pages, (source, *at), pages, (target, *at))
    return ir.get()


def build_compact(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``compact_kv_copy``: moves rows of the cache, in order, sequence by sequence.

    Arguments: pages, copy_length_indptr int32 (b + 1,), copy_src_dst_pos int32 (2, total), page *
    16 + row of source and target, batch size int32.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("kv_cache_compact")
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        pages = _pages_arg(shape)
        batch = T.int32()
        indptr = T.arg("copy_length_indptr", index_buffer(batch + 1))
        moves = T.buffer((2, T.int32()), "int32", elem_offset=T.int32())
        moves = T.arg("copy_src_dst_pos", moves)
        T.arg("batch_size", batch)
        with T.serial(0, indptr[batch]) as i:
            source, target = (_page_and_row(moves[k, i]) for k in (0, 1))
            with T.serial(0, 2) as half, T.serial(0, shape.kv_heads) as head:
                _copy_row(
                    shape,
                    unit,
                    pages,
                    (source[0], half, head, source[1]),
                    pages,
                    (target[0], half, head, target[1]),
                )
    return ir.get()


def build_read(shape: AttentionShape, unit: VectorUnit, layers: int) -> PrimFunc:
    """Return ``kv_cache_debug_get_kv``: rows of the cache into plain arrays.

    Arguments: pages, position_map int32 (n,), k_data and v_data (layers, n, kv_heads, head_dim),
    layer int64.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("kv_cache_read")
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        tokens = T.int64()
        pages = _pages_arg(shape)
        positions = T.arg("position_map", index_buffer(tokens))
        rows = (layers, tokens, shape.kv_heads, shape.head_dim)
        data = [T.arg(name, T.buffer(rows, shape.dtype)) for name in ("k_data", "v_data")]
        layer = T.arg("layer", T.int64())
        with T.serial(0, tokens) as token:
            page, row = _page_and_row(positions[token])
            with T.serial(0, shape.kv_heads) as head:
                for half, out in enumerate(data):
                    at = (page, half, head, row)
                    _copy_row(shape, unit, pages, at, out, (layer, token, head))
    return ir.get()


def build_merge(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``merge_state_inplace``: joins attention over two sets of keys into the first.

    Arguments: v (n, heads, head_dim), s float32 (n, heads) the log-sum-exp (log2), and the other
    pair.
    """
    lanes = unit.dividing(shape.head_dim).lanes
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("attention_merge")
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        rows = T.int32()
        values, lse = [], []
        for suffix in ("", "_other"):
            v = T.buffer((rows, shape.heads, shape.head_dim), shape.dtype)
            values.append(T.arg(f"v{suffix}", v))
            lse.append(T.arg(f"s{suffix}", T.buffer((rows, shape.heads), "float32")))

        def merge(row: Expr) -> None:
            with T.serial(0, shape.heads) as head:
                a, b, both = log_sum_exp_weights(*(s[row, head] for s in lse))
                with T.serial(0, shape.head_dim // lanes) as i:
                    at = (row, head, i * lanes)
                    first, second = (vec.load(v, at, lanes) for v in values)
                    value = first * splat(a, lanes) + second * splat(b, lanes)
                    vec.save(values[0], at, value, lanes)
                store(lse[0], (row, head), both)

        parallel_tokens(rows, merge)
    return ir.get()


def parallel_tokens(tokens: Expr, body: Callable[[Expr], None]) -> None:
    """Run body(token) for all tokens, on all threads if there are enough."""
    for loop in _loops(tokens):
        with loop as token:
            body(token)


def _loops(tokens: Expr) -> Iterator:
    with T.If(tokens >= PARALLEL_TOKENS):
        with T.Then():
            yield T.parallel(0, tokens)
        with T.Else():
            yield T.serial(0, tokens)


def _pages_arg(shape: AttentionShape) -> Buffer:
    page = (shape.kv_heads, TILE, shape.head_dim)
    buffer = T.buffer((T.int64(), 2, *page), shape.dtype, elem_offset=T.int64())
    return T.arg("pages", buffer)


def _page_and_row(position: Expr) -> tuple[Expr, Expr]:
    page = T.cast(T.shift_right(position, T.int32(4)), "int64")
    return T.bind(page), T.bind(T.bitwise_and(position, T.int32(TILE - 1)))


def _copy_row(
    shape: AttentionShape,
    unit: VectorUnit,
    source: Buffer,
    source_at: tuple[Expr, ...],
    target: Buffer,
    target_at: tuple[Expr, ...],
) -> None:
    """Copy head_dim elements as they are."""
    lanes = unit.dividing(shape.head_dim).lanes
    with T.serial(0, shape.head_dim // lanes) as i:
        at = span(i * lanes, lanes)
        store(target, (*target_at, at), source[(*source_at, at)])
