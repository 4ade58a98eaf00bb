"""Prefill attention on CPUs: many query rows of a sequence over the new keys or the paged cache.

Work is split over (query head, tile of up to 32 query rows); a tile walks the keys it may see, so
that every load of a key or value serves all its rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_decode import index_buffer, rope_and_scale_args
from fairy_compile.kernels.attention_cpu_tile import (
    TILE,
    KeyTile,
    QueryTile,
    Visible,
    first_key,
    local_layer,
    page_tile,
)
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, store
from fairy_compile.kernels.attention_shape import AttentionShape
from fairy_compile.kernels.opaque import opaque

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

# Query rows of a task. 32 rows of 128 elements and their outputs are 32 KiB, beside 16 KiB of a
# tile's keys and values in float32.
ROWS = 32


def build_paged_prefill(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``batch_prefill_paged_kv`` as the runtime calls it.

    Arguments: q (n, heads, head_dim), q_indptr int32 (b + 1,), pages (p, 2, kv_heads, 16,
    head_dim), page_indptr int32 (b + 1,), page_values int32, last_page_len int32 (b,),
    k_rope_pos_offset int32 (b,), q_rope_position int32 (n,), output like q, lse float32 (n, heads),
    causal, rotary_mode, rope_scale, rope_theta, sm_scale. ``causal`` aligns the last query with
    the last key.
    """
    return _PagedPrefill(shape, unit).emit()


def build_ragged_prefill(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``batch_prefill_ragged_kv`` as the runtime calls it.

    Arguments: q (n, heads, head_dim), q_indptr int32 (b + 1,), k and v (m, kv_heads, head_dim),
    kv_indptr int32 (b + 1,), q_rope_position int32 (n,), k_rope_pos_offset int32 (b,), output like
    q, lse float32 (n, heads), causal, rotary_mode, rope_scale, rope_theta, sm_scale.
    """
    return _RaggedPrefill(shape, unit).emit()


class _Prefill:
    """What both share; subclasses say where the keys of a sequence are."""

    name: str

    def __init__(self, shape: AttentionShape, unit: VectorUnit) -> None:
        self.shape, self.unit = shape, unit
        self.lanes = unit.dividing(shape.head_dim).lanes

    def emit(self) -> PrimFunc:
        shape = self.shape
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_name(self.name)
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            self.total, self.batch = T.int32(), T.int32()
            rows = (self.total, shape.heads, shape.head_dim)
            self.q = T.arg("q", T.buffer(rows, shape.dtype))
            self.q_indptr = T.arg("q_indptr", index_buffer(self.batch + 1))
            self._key_args()
            self.output = T.arg("output", T.buffer(rows, shape.dtype))
            self.lse = T.arg("lse", T.buffer((self.total, shape.heads), "float32"))
            self.causal = T.arg("causal", T.int32())
            self.sm_scale = rope_and_scale_args()
            self.local = local_layer(shape, self.sm_scale)
            # At most this many tiles: a sequence's last one may be short.
            tiles = T.bind(T.floordiv(self.total, ROWS) + self.batch)
            with T.parallel(0, tiles * shape.heads) as task:
                # Heads are outermost, so that a thread's share has early and late tiles, which
                # see few and many keys.
                head = opaque(T.truncdiv(task, tiles))
                self._attend(opaque(task - head * tiles), head)
        return ir.get()

    def _key_args(self) -> None:
        """Take the arguments between q_indptr and output; sets ``position`` and ``offset``."""
        raise NotImplementedError

    def _key_count(self, sequence: Expr) -> Expr:
        """Return the keys of a sequence."""
        raise NotImplementedError

    def _key_tile(self, sequence: Expr, head: Expr, first: Expr, keys: Expr) -> KeyTile:
        """Return the tile of a sequence of ``keys`` keys that begins at key ``first``."""
        raise NotImplementedError

    def _attend(self, tile: Expr, head: Expr) -> None:
        found = self._find(tile)
        with T.If(found[0] >= 0), T.Then():
            sequence, first = T.bind(found[0]), T.bind(found[1])
            begin = opaque(self.q_indptr[sequence] + first)
            length = opaque(self.q_indptr[sequence + 1] - self.q_indptr[sequence])
            count = opaque(T.min(length - first, ROWS))
            keys = opaque(self._key_count(sequence))
            # Row r sees the keys below reach + r.
            ahead = T.bind(keys - length + first + 1)
            reach = opaque(T.if_then_else(self.causal > 0, ahead, keys))
            end = opaque(T.min(keys, reach + count - 1))
            hidden = self._first_keys(sequence, begin, count)
            queries = QueryTile(self.unit, self.shape, ROWS)
            queries.start(
                lambda row, at: vec.load(self.q, (begin + row, head, at), self.lanes),
                count,
                self.sm_scale,
            )
            tiles = opaque(T.shift_right(end + (TILE - 1), T.int32(4)))
            unseen: Expr | int = 0
            if hidden is not None:
                unseen = opaque(T.min(T.shift_right(hidden[ROWS], 4), tiles))
            with T.serial(0, tiles - unseen) as i:
                at = opaque((unseen + i) * TILE)
                kv_head = opaque(T.floordiv(head, self.shape.group))
                key_tile = self._key_tile(sequence, kv_head, at, keys)

                def visible(row: Expr) -> Visible:
                    first = None if hidden is None else opaque(hidden[row] - at)
                    return Visible(opaque(T.min(reach + row, keys) - at), first)

                queries.attend(key_tile, count, visible)
            with T.serial(0, count) as row:
                place = T.bind(begin + row)
                lse = queries.finish(
                    row,
                    lambda at, value: vec.save(self.output, (place, head, at), value, self.lanes),
                )
                store(self.lse, (place, head), lse)

    def _first_keys(self, sequence: Expr, begin: Expr, count: Expr) -> Buffer | None:
        """Return the first key of every row of a tile, and at [ROWS] the least of them.

        Positions are read row by row: where sequences share pages, the runtime gives the rows of
        several as one.
        """
        if self.local is None:
            return None
        hidden = T.alloc_buffer((ROWS + 1,), "int32")
        store(hidden, ROWS, T.int32(2**31 - 1))
        with T.serial(0, ROWS) as row:
            position = self.position[begin + T.min(row, count - 1)]
            first = opaque(first_key(self.shape, self.local, position, self.offset[sequence]))
            store(hidden, row, first)
            store(hidden, ROWS, T.min(hidden[ROWS], first))
        return hidden

    def _find(self, tile: Expr) -> tuple[Expr, Expr]:
        """Return the sequence a tile is of, or -1, and its first row in it."""
        found = T.alloc_buffer((3,), "int32")  # sequence, row, tiles before this sequence
        store(found, 0, T.int32(-1))
        store(found, 2, T.int32(0))
        with T.serial(0, self.batch) as b:
            length = self.q_indptr[b + 1] - self.q_indptr[b]
            end = T.bind(found[2] + T.floordiv(length + (ROWS - 1), ROWS))
            with T.If(T.And(tile >= found[2], tile < end)), T.Then():
                store(found, 0, b)
                store(found, 1, (tile - found[2]) * ROWS)
            store(found, 2, end)
        return found[0], found[1]


class _PagedPrefill(_Prefill):
    name = "attention_prefill_paged"

    def _key_args(self) -> None:
        shape = self.shape
        page = (shape.kv_heads, TILE, shape.head_dim)
        self.pages = T.arg("pages", T.buffer((T.int64(), 2, *page), shape.dtype))
        self.indptr = T.arg("page_indptr", index_buffer(self.batch + 1))
        self.page_values = T.arg("page_values", index_buffer(T.int32()))
        self.last_page = T.arg("last_page_len", index_buffer(self.batch))
        self.offset = T.arg("k_rope_pos_offset", index_buffer(self.batch))
        self.position = T.arg("q_rope_position", index_buffer(self.total))

    def _key_count(self, sequence: Expr) -> Expr:
        pages = T.bind(self.indptr[sequence + 1] - self.indptr[sequence])
        whole = (pages - 1) * TILE
        return T.if_then_else(pages > 0, whole + self.last_page[sequence], T.int32(0))

    def _key_tile(self, sequence: Expr, head: Expr, first: Expr, keys: Expr) -> KeyTile:
        number = self.indptr[sequence] + T.shift_right(first, T.int32(4))
        page = opaque(T.cast(self.page_values[number], "int64"), "int64")
        count = opaque(T.min(keys - first, TILE))
        return page_tile(self.pages, page, head, count, self.lanes)


class _RaggedPrefill(_Prefill):
    name = "attention_prefill_ragged"

    def _key_args(self) -> None:
        shape = self.shape
        rows = (T.int32(), shape.kv_heads, shape.head_dim)
        self.k = T.arg("k", T.buffer(rows, shape.dtype))
        self.v = T.arg("v", T.buffer(rows, shape.dtype))
        self.indptr = T.arg("kv_indptr", index_buffer(self.batch + 1))
        self.position = T.arg("q_rope_position", index_buffer(self.total))
        self.offset = T.arg("k_rope_pos_offset", index_buffer(self.batch))

    def _key_count(self, sequence: Expr) -> Expr:
        return self.indptr[sequence + 1] - self.indptr[sequence]

    def _key_tile(self, sequence: Expr, head: Expr, first: Expr, keys: Expr) -> KeyTile:
        begin = opaque(self.indptr[sequence] + first)
        last = opaque(self.indptr[sequence] + keys - 1)
        # A short tile repeats the last key: those rows are masked, but must not be read past.
        return KeyTile(
            key=lambda row, at: vec.load(self.k, (T.min(begin + row, last), head, at), self.lanes),
            value=lambda row, at: vec.load(self.v, (begin + row, head, at), self.lanes),
            count=opaque(T.min(keys - first, TILE)),
        )
