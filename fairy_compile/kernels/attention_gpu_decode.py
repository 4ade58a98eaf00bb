"""Decode attention on GPUs with windows and caps: one query row a sequence and head.

A thread group has some query heads that share keys, and walks its part of a context a tile of keys
at a time, with an online softmax (see `attention_cpu_tile`). Every thread takes one key of a tile
for the scores; for the outputs, threads that are neighbours take neighbouring elements of a value.
Contexts are cut into as many parts as keep a GPU busy, which another launch merges
(Flash-Decoding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.attention_cpu_decode import index_buffer, rope_and_scale_args
from fairy_compile.kernels.attention_gpu import (
    THREADS,
    Keys,
    as_dtype,
    capped,
    first_key,
    keep,
    query_scale,
    registers,
    vector,
    window_of,
)
from fairy_compile.kernels.attention_shape import EMPTY, MASKED, PAGE, AttentionShape
from fairy_compile.kernels.gpu_builder import (
    build_function,
    ceildiv,
    launch,
    launch_if,
    load_float,
    local,
    reduce_group,
    scratch,
    shared,
    store,
    strided,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

TILE = THREADS
"""Keys of a tile."""

_MOST_HEADS = 8  # of a thread group: registers
_MOST_QUERY = 1024  # elements of all its query rows: shared memory
_PEAKS = 16  # threads that look for a head's highest score
_PART_PAGES = 16  # a part of a context is at least this many pages
_MOST_PARTS = 32
_GROUPS = 64  # thread groups that keep a GPU busy


def serves(shape: AttentionShape) -> bool:
    """Tell whether a group's threads cover a head."""
    return shape.head_dim // vector(shape.head_dim) <= THREADS and shape.head_dim <= _MOST_QUERY


def build_decode(shape: AttentionShape, *, room: bool = False) -> PrimFunc:
    """Return ``batch_decode_paged_kv`` as the runtime's KV cache calls it.

    Arguments: q (b, heads, head_dim), pages (p, 2, kv_heads, 16, head_dim), page_indptr int32
    (b + 1,), page_values int32, last_page_len int32 (b,), k_rope_pos_offset int32 (b,),
    q_rope_position int32 (b,), output like q, lse float32 (b, heads) in units of log2, rotary_mode,
    rope_scale, rope_theta, sm_scale. Rotary embedding inside the kernel (rotary_mode 1) is refused.

    Args:
        shape: sizes and dtype.
        room: take memory for parts of contexts as further outputs after lse, float32 (b
            times each of `part_sizes`,), as what becomes a CUDA graph must; else the function
            allocates it.
    """
    return build_function("attention_decode", _Decode(shape, room).emit)


def part_sizes(shape: AttentionShape) -> tuple[int, ...]:
    """Return how many elements results of all parts of a context take, by array."""
    groups = shape.heads // _Decode(shape).heads
    parts = shape.heads * min(_MOST_PARTS, -(-_GROUPS // groups))
    return (parts * (shape.head_dim + 1),)


class _Decode:
    def __init__(self, shape: AttentionShape, room: bool = False) -> None:
        self.shape, self.room = shape, room
        self.heads = max(
            n
            for n in range(1, _MOST_HEADS + 1)
            if shape.group % n == 0 and (n == 1 or n * shape.head_dim <= _MOST_QUERY)
        )
        self.lanes = vector(shape.head_dim)
        self.units = shape.head_dim // self.lanes
        self.slices = THREADS // self.units  # of a tile's keys, while outputs are added up

    def emit(self) -> None:
        """Take the arguments and emit both launches."""
        shape = self.shape
        batch, count = T.int32(), T.int32()
        rows = (batch, shape.heads, shape.head_dim)
        self.q = T.arg("q", T.buffer(rows, shape.dtype))
        page = (2, shape.kv_heads, PAGE, shape.head_dim)
        self.pages = T.arg("pages", T.buffer((T.int32(), *page), shape.dtype))
        self.indptr = T.arg("page_indptr", index_buffer(batch + 1))
        self.page_values = T.arg("page_values", index_buffer(count))
        self.last_page = T.arg("last_page_len", index_buffer(batch))
        self.offset = T.arg("k_rope_pos_offset", index_buffer(batch))
        self.position = T.arg("q_rope_position", index_buffer(batch))
        self.output = T.arg("output", T.buffer(rows, shape.dtype))
        self.lse = T.arg("lse", T.buffer((batch, shape.heads), "float32"))
        # Of every part the outputs, and after them the log-sum-exp: WebGPU counts buffers.
        given = [
            T.arg("parts", T.buffer((batch * size,), "float32"))
            for size in (part_sizes(shape) if self.room else ())
        ]
        sm_scale = rope_and_scale_args()
        self.window = window_of(shape, sm_scale)
        self.scale = query_scale(shape, sm_scale)
        self.parts = T.bind(self._parts(batch, count))
        size = batch * shape.heads * self.parts * (shape.head_dim + 1)
        self.partial = given[0] if given else scratch("partial", (size,))
        arguments = [
            self.q, self.pages, self.indptr, self.page_values, self.last_page, self.offset,
            self.position, self.partial, self.lse, self.output,
        ]  # fmt: skip
        groups = shape.heads // self.heads
        extents = {
            "blockIdx.y": batch * groups,  # WebGPU has two dimensions
            "blockIdx.x": self.parts,
            "threadIdx.x": THREADS,
        }
        with launch(extents, arguments) as (row, part, thread):
            sequence, block = T.truncdiv(row, T.int32(groups)), T.truncmod(row, T.int32(groups))
            self._attend(sequence, block, part, thread)
        with launch_if(self.parts > 1):
            extents = {"blockIdx.y": batch, "blockIdx.x": shape.heads, "threadIdx.x": THREADS}
            with launch(extents, [self.partial, self.lse, self.output]) as (sequence, head, thread):
                self._merge(sequence, head, thread)

    def _parts(self, batch: Expr, pages: Expr) -> Expr:
        """Return how many parts each context is cut into; none sees more than all pages."""
        if self.window is not None:
            pages = T.min(pages, ceildiv(self.window, PAGE) + 1)
        groups = T.max(batch * (self.shape.heads // self.heads), T.int32(1))
        wanted = T.min(ceildiv(pages, _PART_PAGES), T.truncdiv(groups + (_GROUPS - 1), groups))
        return T.max(T.min(wanted, T.int32(_MOST_PARTS)), T.int32(1))

    def _attend(self, sequence: Expr, block: Expr, part: Expr, thread: Expr) -> None:
        shape, heads = self.shape, self.heads
        first_head = block * heads
        first_page = keep(self.indptr[sequence])
        count = keep(self.indptr[sequence + 1] - first_page)
        whole = (count - 1) * PAGE + self.last_page[sequence]
        keys = keep(T.if_then_else(count > 0, whole, T.int32(0)))
        hidden = keep(first_key(self.window, self.position[sequence], self.offset[sequence]))
        unseen = keep(T.min(T.shift_right(hidden, T.int32(4)), count))  # whole pages
        parts = keep(self.parts)
        own_pages = keep(T.truncdiv(count - unseen + parts - 1, parts))
        start = keep((unseen + part * own_pages) * PAGE)
        end = keep(T.min(start + own_pages * PAGE, keys))
        source = Keys(
            first_page,
            keep(T.truncdiv(first_head, T.int32(shape.group))),
            pages=self.pages,
            page_values=self.page_values,
        )
        query = shared((heads, shape.head_dim))

        def take_query(i: Any) -> None:
            head, at = (
                T.truncdiv(i, T.int32(shape.head_dim)),
                T.truncmod(i, T.int32(shape.head_dim)),
            )
            value = load_float(self.q, sequence, first_head + head, at) * self.scale
            store(query, (head, at), value)

        strided(heads * shape.head_dim, thread, THREADS, take_query)
        self.scores = shared((heads, TILE))
        peaks = shared((heads, _PEAKS))
        peak, total = registers(heads, EMPTY), registers(heads)
        shrink, weights = registers(heads), local((heads,))
        out = registers(heads * self.lanes)
        unit = T.truncmod(thread, T.int32(self.units)) * self.lanes
        own_slice = T.truncdiv(thread, T.int32(self.units))
        with T.serial(0, ceildiv(T.max(end - start, T.int32(0)), TILE)) as step:
            first = keep(start + step * TILE)
            self._score(source, query, first + thread, hidden, end, thread)
            self._raise_peaks(peaks, peak, shrink, thread)
            for h in range(heads):
                # Masked scores weigh nothing, also where no key was seen yet.
                store(weights, h, T.exp2(self.scores[h, thread] - peak[h]))
                store(total, h, total[h] * shrink[h] + weights[h])
            for h in range(heads):
                store(self.scores, (h, thread), weights[h])
            self._add_values(source, first, end, unit, own_slice, shrink, out)
        place = (sequence, first_head, part, parts)
        self._finish(place, thread, unit, own_slice, peak, total, out)

    def _score(
        self, source: Keys, query: Buffer, key: Expr, hidden: Expr, end: Expr, thread: Expr
    ) -> None:
        """Store a thread's scores, of its key and all heads."""
        heads, lanes = self.heads, self.lanes
        sums, loaded = registers(heads), local((lanes,))
        seen = T.And(key >= hidden, key < end)
        with when(seen):
            place = source.place(key)
            with T.serial(0, self.units) as i:
                source.load(0, place, i * lanes, loaded, 0, lanes)
                for h in range(heads):
                    for c in range(lanes):
                        store(sums, h, sums[h] + query[h, i * lanes + c] * loaded[c])
        for h in range(heads):
            score = T.if_then_else(seen, capped(self.shape, sums[h]), T.float32(MASKED))
            store(self.scores, (h, thread), score)

    def _raise_peaks(self, peaks: Buffer, peak: Buffer, shrink: Buffer, thread: Expr) -> None:
        """Raise the peaks to a tile's highest scores; ``shrink`` is what earlier sums lose."""
        own = TILE // _PEAKS

        def look(i: Any) -> None:
            head, slot = T.truncdiv(i, T.int32(_PEAKS)), T.truncmod(i, T.int32(_PEAKS))
            highest = registers(1, MASKED)
            for k in range(own):
                # Neighbouring threads read neighbouring scores.
                score = self.scores[head, slot + k * _PEAKS]
                store(highest, 0, T.max(highest[0], score))
            store(peaks, (head, slot), highest[0])

        strided(self.heads * _PEAKS, thread, THREADS, look)
        for h in range(self.heads):
            highest = registers(1)
            store(highest, 0, peak[h])
            with T.serial(0, _PEAKS) as k:
                store(highest, 0, T.max(highest[0], peaks[h, k]))
            store(shrink, h, T.exp2(peak[h] - highest[0]))
            store(peak, h, highest[0])

    def _add_values(
        self,
        source: Keys,
        first: Expr,
        end: Expr,
        unit: Expr,
        own_slice: Expr,
        shrink: Buffer,
        out: Buffer,
    ) -> None:
        """Add a tile's weighted values up: a slice of the keys, a thread's elements of them."""
        heads, lanes = self.heads, self.lanes
        loaded = local((lanes,))
        for i in range(heads * lanes):
            store(out, i, out[i] * shrink[i // lanes])
        count = keep(T.min(end - first, T.int32(TILE)))
        with T.serial(0, ceildiv(TILE, self.slices)) as turn:
            key = turn * self.slices + own_slice
            with when(T.And(key < count, own_slice < self.slices)):
                place = source.place(first + key)
                source.load(1, place, unit, loaded, 0, lanes)
                for h in range(heads):
                    weight = T.bind(self.scores[h, key])
                    for c in range(lanes):
                        at = h * lanes + c
                        store(out, at, out[at] + weight * loaded[c])

    def _own(self, sequence: Expr, head: Expr, part: Any, parts: Expr) -> Expr:
        """Return where the results of a part of a head's context begin."""
        number = (sequence * self.shape.heads + head) * parts + part
        return number * (self.shape.head_dim + 1)

    def _finish(
        self,
        place: tuple[Expr, Expr, Expr, Expr],
        thread: Expr,
        unit: Expr,
        own_slice: Expr,
        peak: Buffer,
        total: Buffer,
        out: Buffer,
    ) -> None:
        """Add up what the slices of a part have, and write it; see `_attend` for ``place``."""
        shape, lanes = self.shape, self.lanes
        sequence, first_head, part, parts = place
        sums = shared((self.slices, shape.head_dim))
        totals = reduce_group(
            [total[h] for h in range(self.heads)], lambda a, b: a + b, thread, THREADS
        )
        for h in range(self.heads):
            head = first_head + h
            own = self._own(sequence, head, part, parts)
            with when(own_slice < self.slices):
                for c in range(lanes):
                    store(sums, (own_slice, unit + c), out[h * lanes + c])
            inverse = T.bind(T.if_then_else(totals[h] > 0, T.float32(1) / totals[h], T.float32(0)))

            def write(i: Any, head: Expr = head, own: Expr = own, inverse: Expr = inverse) -> None:
                value = registers(1)
                for s in range(self.slices):
                    store(value, 0, value[0] + sums[s, i])
                with T.If(parts > 1):
                    with T.Then():
                        store(self.partial, own + i, value[0] * inverse)
                    with T.Else():
                        result = as_dtype(value[0] * inverse, shape.dtype)
                        store(self.output, (sequence, head, i), result)

            strided(shape.head_dim, thread, THREADS, write)
            lse = T.if_then_else(totals[h] > 0, peak[h] + T.log2(totals[h]), T.float32(EMPTY))
            with when(thread == 0), T.If(parts > 1):
                with T.Then():
                    store(self.partial, own + shape.head_dim, lse)
                with T.Else():
                    store(self.lse, (sequence, head), lse)

    def _merge(self, sequence: Expr, head: Expr, thread: Expr) -> None:
        """Merge the parts of a context."""
        head_dim, parts = self.shape.head_dim, keep(self.parts)
        first = keep(self._own(sequence, head, 0, parts))
        peak, total = registers(1, EMPTY), registers(1)

        def result(part: Expr, i: Any) -> Expr:
            return self.partial[first + part * (head_dim + 1) + i]

        with T.serial(0, parts) as part:
            store(peak, 0, T.max(peak[0], result(part, head_dim)))
        with T.serial(0, parts) as part:
            store(total, 0, total[0] + T.exp2(result(part, head_dim) - peak[0]))

        def write(i: Any) -> None:
            value = registers(1)
            with T.serial(0, parts) as part:
                weight = T.exp2(result(part, head_dim) - peak[0])
                store(value, 0, value[0] + result(part, i) * weight)
            merged = as_dtype(value[0] / total[0], self.shape.dtype)
            store(self.output, (sequence, head, i), merged)

        strided(head_dim, thread, THREADS, write)
        with when(thread == 0):
            store(self.lse, (sequence, head), T.log2(total[0]) + peak[0])
