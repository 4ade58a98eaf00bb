"""Prefill attention on GPUs with windows and caps, over new keys or the paged cache.

A thread group has `rows` query rows of a sequence that share keys: all heads of a few tokens. It
walks the keys they may see `KEYS` at a time, with an online softmax (see `attention_cpu_tile`). For
scores, slabs of queries and keys lie in shared memory, depth first, and every thread has some rows
by `SIDE` keys; then a few threads share a row, and turn its scores into weights; for outputs, every
thread has `SIDE` rows, and some elements of values, which neighbours read side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.attention_cpu_decode import index_buffer, rope_and_scale_args
from fairy_compile.kernels.attention_gpu import (
    LAST,
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
    load_float,
    local,
    shared,
    store,
    strided,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

KEYS = 32
"""Keys of a tile."""

SIDE = 4
_PITCH = KEYS + 1  # of rows of scores; one more, as of slabs, against bank conflicts
_SLAB = 32  # elements of queries and keys in shared memory at a time
_MOST_OUTPUTS = 64  # registers of a thread
MOST_DIM = 256
"""Elements of the largest head whose outputs these are."""


def serves(shape: AttentionShape) -> bool:
    """Tell whether a thread can keep its share of the outputs in registers."""
    return shape.head_dim <= MOST_DIM


def _outputs(shape: AttentionShape, rows: int) -> int:
    """Return the outputs of a thread."""
    lanes = vector(shape.head_dim)
    across = THREADS // (rows // SIDE)
    return SIDE * lanes * -(-shape.head_dim // (lanes * across))


def build_paged_prefill(shape: AttentionShape) -> PrimFunc:
    """Return ``batch_prefill_paged_kv`` as the runtime's KV cache calls it.

    Arguments: q (n, heads, head_dim), q_indptr int32 (b + 1,), pages (p, 2, kv_heads, 16,
    head_dim), page_indptr int32 (b + 1,), page_values int32, last_page_len int32 (b,),
    k_rope_pos_offset int32 (b,), q_rope_position int32 (n,), output like q, lse float32 (n, heads)
    in units of log2, causal, rotary_mode, rope_scale, rope_theta, sm_scale. ``causal`` aligns the
    last query with the last key.
    """
    return build_function("attention_prefill_paged", _Prefill(shape, paged=True).emit)


def build_ragged_prefill(shape: AttentionShape) -> PrimFunc:
    """Return ``batch_prefill_ragged_kv`` as the runtime's KV cache calls it.

    Arguments: q (n, heads, head_dim), q_indptr int32 (b + 1,), k and v (m, kv_heads, head_dim),
    kv_indptr int32 (b + 1,), q_rope_position int32 (n,), k_rope_pos_offset int32 (b,), and the rest
    as `build_paged_prefill`.
    """
    return build_function("attention_prefill_ragged", _Prefill(shape, paged=False).emit)


def _place(row: Any, key: Any) -> Any:
    """Return where a score lies."""
    return row * _PITCH + key


class _Prefill:
    def __init__(self, shape: AttentionShape, *, paged: bool) -> None:
        self.shape, self.paged = shape, paged
        self.lanes = vector(shape.head_dim)
        # As many rows as registers and 16 KiB of shared memory take.
        wide = shape.dtype == "float16" and _outputs(shape, 64) <= _MOST_OUTPUTS
        self.rows = 64 if wide else 32
        self.side = self.rows * KEYS // (THREADS * SIDE)  # rows of a thread's scores
        self.across = THREADS // (self.rows // SIDE)  # threads that share rows of outputs
        self.turns = -(-shape.head_dim // (self.lanes * self.across))

    def emit(self) -> None:
        """Take the arguments and emit the launch."""
        shape = self.shape
        self.total, self.batch = T.int32(), T.int32()
        rows = (self.total, shape.heads, shape.head_dim)
        self.q = T.arg("q", T.buffer(rows, shape.dtype))
        self.q_indptr = T.arg("q_indptr", index_buffer(self.batch + 1))
        keys = self._key_args()
        self.output = T.arg("output", T.buffer(rows, shape.dtype))
        self.lse = T.arg("lse", T.buffer((self.total, shape.heads), "float32"))
        self.causal = T.arg("causal", T.int32())
        sm_scale = rope_and_scale_args()
        self.window = window_of(shape, sm_scale)
        self.scale = query_scale(shape, sm_scale)
        # At most this many tiles: a sequence's last one may be short.
        tiles = T.truncdiv(self.total * shape.group, T.int32(self.rows)) + self.batch
        extents = {
            "blockIdx.y": shape.kv_heads,
            "blockIdx.x": tiles,
            "threadIdx.x": THREADS,
        }
        arguments = [self.q, self.q_indptr, *keys, self.lse, self.output]
        with launch(extents, arguments) as (kv_head, tile, thread):
            self.kv_head, self.thread = kv_head, thread
            self._attend(tile)

    def _key_args(self) -> list[Buffer]:
        """Take the arguments between q_indptr and output, and return them."""
        shape = self.shape
        if self.paged:
            page = (2, shape.kv_heads, PAGE, shape.head_dim)
            self.pages = T.arg("pages", T.buffer((T.int32(), *page), shape.dtype))
            self.indptr = T.arg("page_indptr", index_buffer(self.batch + 1))
            self.page_values = T.arg("page_values", index_buffer(T.int32()))
            self.last_page = T.arg("last_page_len", index_buffer(self.batch))
            self.offset = T.arg("k_rope_pos_offset", index_buffer(self.batch))
            self.position = T.arg("q_rope_position", index_buffer(self.total))
            tables = [self.indptr, self.page_values, self.last_page]
            return [self.pages, *tables, self.offset, self.position]
        new = (T.int32(), shape.kv_heads, shape.head_dim)
        self.k, self.v = (T.arg(name, T.buffer(new, shape.dtype)) for name in "kv")
        self.indptr = T.arg("kv_indptr", index_buffer(self.batch + 1))
        self.position = T.arg("q_rope_position", index_buffer(self.total))
        self.offset = T.arg("k_rope_pos_offset", index_buffer(self.batch))
        return [self.k, self.v, self.indptr, self.position, self.offset]

    def _keys(self, sequence: Expr) -> tuple[Keys, Expr]:
        """Return the keys of a sequence, and how many they are."""
        begin = keep(self.indptr[sequence])
        count = keep(self.indptr[sequence + 1] - begin)
        if not self.paged:
            return Keys(begin, self.kv_head, k=self.k, v=self.v), count
        whole = (count - 1) * PAGE + self.last_page[sequence]
        source = Keys(begin, self.kv_head, pages=self.pages, page_values=self.page_values)
        return source, keep(T.if_then_else(count > 0, whole, T.int32(0)))

    def _attend(self, tile: Expr) -> None:
        """Emit what a thread group does: nothing, if there is no such tile of rows."""
        group, rows = self.shape.group, self.rows
        found = self._find(tile)
        exists = found[0] >= 0
        sequence = keep(T.max(found[0], T.int32(0)))
        self.first = keep(found[1])  # row of the sequence: of all its tokens' heads in turn
        self.begin = keep(self.q_indptr[sequence])
        length = keep(self.q_indptr[sequence + 1] - self.begin)
        left = T.min(length * group - self.first, T.int32(rows))
        self.count = keep(T.if_then_else(exists, left, T.int32(0)))
        source, keys = self._keys(sequence)
        # The token at t in its sequence sees the keys below t + ahead.
        ahead = T.if_then_else(self.causal > 0, keys - length + 1, keys)
        self.ahead, self.keys = keep(ahead), keys
        last = keep(T.truncdiv(self.first + self.count - 1, group))
        end = T.min(keys, T.if_then_else(self.causal > 0, last + ahead, keys))
        self.end = keep(T.if_then_else(self.count > 0, end, T.int32(0)))
        start = self._start(sequence, last)
        self._declare(sequence)
        steps = ceildiv(T.max(self.end - start, T.int32(0)), KEYS)
        with T.serial(0, steps) as step:
            at = keep(start + step * KEYS)
            self._score(source, at)
            self._soften(at)
            self._add_values(source, at)
        self._write()

    def _find(self, tile: Expr) -> Buffer:
        """Return the sequence a tile is of, or -1, and the first of its rows."""
        found = local((3,), "int32")  # sequence, row, tiles before this sequence
        store(found, 0, T.int32(-1))
        store(found, 1, T.int32(0))
        store(found, 2, T.int32(0))
        with T.serial(0, self.batch) as b:
            length = self.q_indptr[b + 1] - self.q_indptr[b]
            end = T.bind(found[2] + ceildiv(length * self.shape.group, self.rows))
            with when(T.And(tile >= found[2], tile < end)):
                store(found, 0, b)
                store(found, 1, (tile - found[2]) * self.rows)
            store(found, 2, end)
        return found

    def _start(self, sequence: Expr, last: Expr) -> Expr:
        """Return the first key of the first tile that a row of this group sees.

        Positions are read token by token: where sequences share pages, the runtime gives the rows
        of several as one.
        """
        if self.window is None:
            return T.int32(0)
        least = local((1,), "int32")
        store(least, 0, T.int32(LAST))
        first = keep(T.truncdiv(self.first, self.shape.group))
        with T.serial(0, T.if_then_else(self.count > 0, last - first + 1, T.int32(0))) as i:
            store(least, 0, T.min(least[0], self.position[self.begin + first + i]))
        hidden = first_key(self.window, least[0], self.offset[sequence])
        return keep(T.truncdiv(T.min(hidden, self.end), T.int32(KEYS)) * KEYS)

    def _declare(self, sequence: Expr) -> None:
        """Make what lives through all tiles, and tell which keys a thread's own row sees."""
        rows, group = self.rows, self.shape.group
        self.sharers = THREADS // rows
        self.row = keep(T.truncdiv(self.thread, T.int32(self.sharers)))
        self.sharer = keep(T.truncmod(self.thread, T.int32(self.sharers)))
        # In one dimension, since TVM would take the padding out of two.
        self.slab_q = shared((_SLAB * (rows + 1),), self.shape.dtype)
        self.slab_k = shared((_SLAB * (KEYS + 1),), self.shape.dtype)
        self.scores = shared((rows * _PITCH,))
        self.shrink = shared((rows,))
        self.out = registers(SIDE * self.turns * self.lanes)
        self.peak, self.sum = registers(1, EMPTY), registers(1)
        token = keep(T.truncdiv(self.first + T.min(self.row, self.count - 1), T.int32(group)))
        reach = T.if_then_else(self.causal > 0, T.min(token + self.ahead, self.keys), self.keys)
        self.reach = keep(reach)
        self.hidden: Expr = T.int32(0)
        if self.window is not None:
            # No row is read where a group has none.
            place = T.min(self.begin + token, self.total - 1)
            position = self.position[T.max(place, T.int32(0))]
            self.hidden = keep(first_key(self.window, position, self.offset[sequence]))

    def _row(self, row: Expr) -> tuple[Expr, Expr]:
        """Return (token, head) of a row of the group."""
        at, group = self.first + row, T.int32(self.shape.group)
        token = self.begin + T.truncdiv(at, group)
        return token, self.kv_head * group + T.truncmod(at, group)

    def _score(self, source: Keys, at: Expr) -> None:
        """Store the scores of a tile."""
        shape, lanes, thread = self.shape, self.lanes, self.thread
        side = self.side
        sums = registers(side * SIDE)
        own_row = T.truncdiv(thread, T.int32(KEYS // SIDE)) * side
        own_key = T.truncmod(thread, T.int32(KEYS // SIDE)) * SIDE
        queries, keys, values = local((side,)), local((SIDE,)), local((lanes,))

        def slab(first: Any, depth: int) -> None:
            units = depth // lanes

            def take_query(i: Any) -> None:
                row, unit = T.truncdiv(i, T.int32(units)), T.truncmod(i, T.int32(units)) * lanes
                token, head = self._row(T.min(row, self.count - 1))
                where = (token, head, first + unit)
                self._copy(where, unit, row)

            def take_key(i: Any) -> None:
                key, unit = T.truncdiv(i, T.int32(units)), T.truncmod(i, T.int32(units)) * lanes
                place = source.place(T.min(at + key, self.keys - 1))
                source.load(0, place, first + unit, values, 0, lanes)
                for c in range(lanes):
                    to = (unit + c) * (KEYS + 1) + key
                    store(self.slab_k, to, as_dtype(values[c], shape.dtype))

            strided(self.rows * units, thread, THREADS, take_query)
            strided(KEYS * units, thread, THREADS, take_key)
            with T.serial(0, depth) as d:
                for i in range(side):
                    store(queries, i, load_float(self.slab_q, d * (self.rows + 1) + own_row + i))
                for j in range(SIDE):
                    store(keys, j, load_float(self.slab_k, d * (KEYS + 1) + own_key + j))
                for i in range(side):
                    for j in range(SIDE):
                        place = i * SIDE + j
                        store(sums, place, sums[place] + queries[i] * keys[j])

        whole, rest = divmod(shape.head_dim, _SLAB)
        if whole:
            with T.serial(0, whole) as s:
                slab(s * _SLAB, _SLAB)
        if rest:
            slab(whole * _SLAB, rest)
        for i in range(side):
            for j in range(SIDE):
                store(self.scores, _place(own_row + i, own_key + j), sums[i * SIDE + j])

    def _copy(self, where: tuple[Any, ...], unit: Expr, row: Expr) -> None:
        """Copy ``lanes`` neighbours of a query row to the slab."""
        *lead, first = where
        lanes = self.lanes
        values = local((lanes,), self.shape.dtype)
        if lanes == 1:
            store(values, 0, self.q[(*lead, first)])
        else:
            store(values, T.ramp(0, 1, lanes), self.q[(*lead, T.ramp(first, 1, lanes))])
        for c in range(lanes):
            store(self.slab_q, (unit + c) * (self.rows + 1) + row, values[c])

    def _soften(self, at: Expr) -> None:
        """Turn the scores of a tile into weights, raising the peaks of rows where needed."""
        row, own = self.row, KEYS // self.sharers
        scores, highest = local((own,)), registers(1)
        for k in range(own):
            j = self.sharer + k * self.sharers
            seen = T.And(at + j >= self.hidden, at + j < self.reach)
            score = capped(self.shape, self.scores[_place(row, j)] * self.scale)
            store(scores, k, T.if_then_else(seen, score, T.float32(MASKED)))
        for k in range(own):
            store(self.scores, _place(row, self.sharer + k * self.sharers), scores[k])
        store(highest, 0, self.peak[0])
        with T.serial(0, KEYS) as j:
            store(highest, 0, T.max(highest[0], self.scores[_place(row, j)]))
        shrink = T.bind(T.exp2(self.peak[0] - highest[0]))
        store(self.peak, 0, highest[0])
        store(self.sum, 0, self.sum[0] * shrink)
        for k in range(own):
            store(scores, k, T.exp2(scores[k] - highest[0]))
            store(self.sum, 0, self.sum[0] + scores[k])
        for k in range(own):
            store(self.scores, _place(row, self.sharer + k * self.sharers), scores[k])
        with when(self.sharer == 0):
            store(self.shrink, row, shrink)

    def _add_values(self, source: Keys, at: Expr) -> None:
        """Add a tile's weighted values to the outputs."""
        lanes, turns = self.lanes, self.turns
        own = T.truncdiv(self.thread, T.int32(self.across)) * SIDE
        lane = T.truncmod(self.thread, T.int32(self.across)) * lanes
        factors, weights = local((SIDE,)), local((SIDE,))
        values = registers(turns * lanes)
        for i in range(SIDE):
            store(factors, i, self.shrink[own + i])
        for i in range(SIDE):
            for c in range(turns * lanes):
                place = i * turns * lanes + c
                store(self.out, place, self.out[place] * factors[i])
        with T.serial(0, T.min(self.end - at, T.int32(KEYS))) as key:
            place = source.place(at + key)
            for turn in range(turns):
                with self._elements(turn, lane) as first:
                    source.load(1, place, first, values, turn * lanes, lanes)
            for i in range(SIDE):
                store(weights, i, self.scores[_place(own + i, key)])
            for i in range(SIDE):
                for c in range(turns * lanes):
                    to = i * turns * lanes + c
                    store(self.out, to, self.out[to] + weights[i] * values[c])

    @contextmanager
    def _elements(self, turn: int, lane: Expr) -> Iterator[Expr]:
        """Open a block that runs where a thread has elements in a turn; yields the first."""
        step = self.across * self.lanes
        first = lane + turn * step
        if (turn + 1) * step <= self.shape.head_dim:
            yield first
        else:
            with when(first < self.shape.head_dim):
                yield first

    def _write(self) -> None:
        shape, lanes, thread = self.shape, self.lanes, self.thread
        store(self.scores, _place(self.row, self.sharer), self.sum[0])
        total = registers(1)
        for k in range(self.sharers):
            store(total, 0, total[0] + self.scores[_place(self.row, k)])
        with when(self.sharer == 0):
            inverse = T.if_then_else(total[0] > 0, T.float32(1) / total[0], T.float32(0))
            # The factors of rows go where those of tiles were.
            store(self.shrink, self.row, inverse)
            with when(self.row < self.count):
                token, head = self._row(self.row)
                lse = self.peak[0] + T.log2(total[0])
                store(self.lse, (token, head), T.if_then_else(total[0] > 0, lse, T.float32(EMPTY)))
        own = T.truncdiv(thread, T.int32(self.across)) * SIDE
        lane = T.truncmod(thread, T.int32(self.across)) * lanes
        for i in range(SIDE):
            factor = T.bind(self.shrink[own + i])
            with when(own + i < self.count):
                token, head = self._row(own + i)
                for turn in range(self.turns):
                    with self._elements(turn, lane) as first:
                        for c in range(lanes):
                            value = self.out[(i * self.turns + turn) * lanes + c] * factor
                            where = (token, head, first + c)
                            store(self.output, where, as_dtype(value, shape.dtype))
