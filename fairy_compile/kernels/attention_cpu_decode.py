"""Decode attention on CPUs: one query row per sequence and head over the paged cache.

Work is split over (sequence, key/value head, part of the context); the query heads of a group are
rows of one tile and share every load of keys and values. Each task leaves normalised partial
results and their log-sum-exps, which a short second step combines (Flash-Decoding).

Where a context is cut depends on its own length alone, so that no result depends, not even in its
last bit, on the sequences it is computed beside. Pages that lie before a layer's sliding window are
not read.

Walking several heads of a page in a task, for longer runs of memory, and huge pages for the cache
measured the same within 3 %: with the next page prefetched, reading is at memory bandwidth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_tile import (
    TILE,
    QueryTile,
    Visible,
    first_key,
    local_layer,
    page_tile,
)
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, span, splat, store
from fairy_compile.kernels.attention_shape import AttentionShape
from fairy_compile.kernels.opaque import opaque

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

# Tasks of a single long context: a few for each thread of a large machine, so that static chunks
# come out even.
TASKS = 64
# A part of a context is at least this many pages: setting up a task costs about as much as a page.
PART_PAGES = 8
# Handing work to other threads costs some microseconds: what reading this many elements takes.
PARALLEL_ELEMENTS = 1 << 15
_LINE_BYTES = 64
_PREFETCH_L1 = 3  # LLVM's temporal locality


def build_decode(shape: AttentionShape, unit: VectorUnit) -> PrimFunc:
    """Return ``batch_decode_paged_kv`` as the runtime calls it.

    Arguments: q (b, heads, head_dim), pages (p, 2, kv_heads, 16, head_dim), page_indptr int32
    (b + 1,), page_values int32, last_page_len int32 (b,), k_rope_pos_offset int32 (b,),
    q_rope_position int32 (b,), output like q, lse float32 (b, heads), rotary_mode, rope_scale,
    rope_theta, sm_scale. Rotary embedding inside the kernel (rotary_mode 1) is refused.
    """
    return _Decode(shape, unit).emit()


class _Decode:
    def __init__(self, shape: AttentionShape, unit: VectorUnit) -> None:
        self.shape, self.unit = shape, unit

    def emit(self) -> PrimFunc:
        shape, dtype = self.shape, self.shape.dtype
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_name("attention_decode")
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            batch = self.batch = T.int32()
            rows = (batch, shape.heads, shape.head_dim)
            page = (shape.kv_heads, TILE, shape.head_dim)
            self.q = T.arg("q", T.buffer(rows, dtype))
            self.pages = T.arg("pages", T.buffer((T.int64(), 2, *page), dtype))
            self.indptr = T.arg("page_indptr", index_buffer(batch + 1))
            self.page_values = T.arg("page_values", index_buffer(T.int32()))
            self.last_page = T.arg("last_page_len", index_buffer(batch))
            self.offset = T.arg("k_rope_pos_offset", index_buffer(batch))
            self.position = T.arg("q_rope_position", index_buffer(batch))
            self.output = T.arg("output", T.buffer(rows, dtype))
            self.lse = T.arg("lse", T.buffer((batch, shape.heads), "float32"))
            self.sm_scale = rope_and_scale_args()
            self.local = local_layer(shape, self.sm_scale)
            self._attend()
        return ir.get()

    def _attend(self) -> None:
        shape, heads = self.shape, self.batch * self.shape.kv_heads
        total_pages = T.bind(self.indptr[self.batch])
        self.parts = self._count_parts()
        tasks = T.bind(heads * self.parts)
        room = heads * self._most_parts
        self.part_out = T.alloc_buffer((room, shape.group, shape.head_dim), "float32")
        self.part_lse = T.alloc_buffer((room, shape.group), "float32")
        page_elements = 2 * shape.kv_heads * TILE * shape.head_dim
        with T.If(total_pages * page_elements >= PARALLEL_ELEMENTS):
            with T.Then(), T.parallel(0, tasks) as task:
                self._attend_part(task)
            with T.Else(), T.serial(0, tasks) as task:
                self._attend_part(task)
        self._combine()

    @property
    def _most_parts(self) -> int:
        return -(-TASKS // self.shape.kv_heads)

    def _parts_of(self, pages: Expr) -> Expr:
        """Return how many parts a context of ``pages`` is cut into."""
        # Truncated division: TVM takes minutes to lower nested floor divisions by variables.
        parts = T.truncdiv(pages + (PART_PAGES - 1), PART_PAGES)
        return T.max(T.min(parts, T.int32(self._most_parts)), T.int32(1))

    def _count_parts(self) -> Expr:
        """Return the parts of the longest context; those that others lack are empty tasks."""
        longest = T.alloc_buffer((1,), "int32")
        store(longest, 0, T.int32(1))
        with T.serial(0, self.batch) as b:
            pages = self.indptr[b + 1] - self.indptr[b] - self._first_page(b)
            store(longest, 0, T.max(longest[0], pages))
        return T.bind(self._parts_of(longest[0]))

    def _first_key(self, sequence: Expr) -> Expr | None:
        if self.local is None:
            return None
        at = (self.position[sequence], self.offset[sequence])
        return opaque(first_key(self.shape, self.local, *at))

    def _first_page(self, sequence: Expr) -> Expr | int:
        """Return the first of a sequence's pages that its query sees, at most their number."""
        first = self._first_key(sequence)
        if first is None:
            return 0
        pages = self.indptr[sequence + 1] - self.indptr[sequence]
        return opaque(T.min(T.shift_right(first, T.int32(4)), pages))

    def _task(self, sequence: Expr, head: Expr, part: Expr) -> Expr:
        """Number the tasks, sequences innermost: a thread's share has short and long ones."""
        return (part * self.shape.kv_heads + head) * self.batch + sequence

    def _attend_part(self, task: Expr) -> None:
        shape = self.shape
        b = opaque(T.truncmod(task, self.batch))
        rest = T.bind(T.truncdiv(task, self.batch))
        head = opaque(T.truncmod(rest, T.int32(shape.kv_heads)))
        part = opaque(T.truncdiv(rest, T.int32(shape.kv_heads)))
        first_key = self._first_key(b)
        unseen = self._first_page(b)
        begin = opaque(self.indptr[b] + unseen)
        pages = opaque(self.indptr[b + 1] - begin)
        queries = QueryTile(self.unit, shape, shape.group)
        lanes = queries.unit.lanes
        queries.start(
            lambda row, at: vec.load(self.q, (b, head * shape.group + row, at), lanes),
            shape.group,
            self.sm_scale,
        )
        parts = opaque(self._parts_of(pages))
        first = opaque(T.truncdiv(pages * T.min(part, parts), parts))
        end = opaque(T.truncdiv(pages * T.min(part + 1, parts), parts))
        with T.serial(0, end - first) as i:
            at = T.bind(first + i)
            page = opaque(T.cast(self.page_values[begin + at], "int64"), "int64")
            more = T.bind(at + 1 < end)
            next_head = T.min(head + 1, shape.kv_heads - 1)
            self._prefetch(
                T.bind(begin + T.if_then_else(more, at + 1, first)),
                T.bind(T.if_then_else(more, head, next_head)),
            )
            count = opaque(T.if_then_else(at == pages - 1, self.last_page[b], T.int32(TILE)))
            tile = page_tile(self.pages, page, head, count, lanes)
            hidden = None if first_key is None else opaque(first_key - (unseen + at) * TILE)
            queries.attend(tile, shape.group, lambda _: Visible(count, hidden))
        with T.serial(0, shape.group) as row:
            lse = queries.finish(
                row, lambda at, value: store(self.part_out, (task, row, span(at, lanes)), value)
            )
            store(self.part_lse, (task, row), lse)

    def _prefetch(self, at: Expr, head: Expr) -> None:
        """Prefetch the keys and values that come next: of the next page or, at the end, head.

        Hardware prefetching stops at every 4 KiB, which is about one head of a page.
        """
        page = T.bind(T.cast(self.page_values[at], "int64"))
        line = _LINE_BYTES // (2 if self.shape.dtype == "float16" else 4)
        for half in (0, 1):
            with T.serial(0, -(-TILE * self.shape.head_dim // line)) as i:
                address = T.address_of(self.pages[page, half, head, 0, i * line])
                T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, _PREFETCH_L1, 1))

    def _combine(self) -> None:
        """Write the sum of the parts weighted by 2^lse, and the log-sum-exp of all."""
        shape, lanes = self.shape, self.unit.dividing(self.shape.head_dim).lanes
        state = T.alloc_buffer((2,), "float32")  # peak, sum of 2^(lse - peak)
        with T.serial(0, self.batch) as b, T.serial(0, shape.heads) as head:
            kv_head = T.bind(T.floordiv(head, shape.group))
            row = T.bind(T.floormod(head, shape.group))
            store(state, 0, self.part_lse[self._task(b, kv_head, 0), row])
            with T.serial(0, self.parts) as part:
                lse = self.part_lse[self._task(b, kv_head, part), row]
                store(state, 0, T.max(state[0], lse))
            store(state, 1, T.float32(0))
            with T.serial(0, self.parts) as part:
                lse = self.part_lse[self._task(b, kv_head, part), row]
                store(state, 1, state[1] + vec.exp2(lse - state[0], 1))
            lse = T.bind(state[0] + T.log2(state[1]))
            store(self.lse, (b, head), lse)
            with T.serial(0, shape.head_dim // lanes) as i:
                at = T.bind(i * lanes)
                (total,) = vec.zeros(1, lanes)
                with T.serial(0, self.parts) as part:
                    task = T.bind(self._task(b, kv_head, part))
                    weight = vec.exp2(self.part_lse[task, row] - lse, 1)
                    value = self.part_out[task, row, span(at, lanes)] * splat(weight, lanes)
                    store(total, span(0, lanes), total[span(0, lanes)] + value)
                vec.save(self.output, (b, head, at), total[span(0, lanes)], lanes)


def index_buffer(size: Expr) -> Buffer:
    """Return an int32 argument that may be a view at an offset, as the runtime's index arrays."""
    return T.buffer((size,), "int32", elem_offset=T.int32())


def rope_and_scale_args() -> Expr:
    """Take the last four arguments of the attention kernels; return sm_scale.

    The runtime rotates queries and keys before it calls them, except where it slides the window of
    a whole cache itself, which these kernels do not serve; windows of layers are theirs.
    """
    mode = T.arg("rotary_mode", T.int32())
    T.arg("rope_scale", T.float32())
    T.arg("rope_theta", T.float32())
    sm_scale = T.arg("sm_scale", T.float32())
    with T.Assert(mode == 0, "this library was compiled without sliding-window attention"):
        pass
    return sm_scale
