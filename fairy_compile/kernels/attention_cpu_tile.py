"""Online softmax of a few query rows over tiles of sixteen keys: what all CPU attention shares.

For every query row, with scores in units of log2 (the query is scaled by ``sm_scale * log2 e``):

    peak' = max(peak, max s)
    total = total * 2^(peak - peak') + sum 2^(s - peak')
    out   = out   * 2^(peak - peak') + sum 2^(s - peak') v

so that out / total is the attention and peak + log2(total) its log-sum-exp (Milakov and
Gimelshein, arXiv 1805.02867). Rows are handled in blocks of four, two or one: a key or value that
was loaded and widened to float32 serves the whole block.

Windows and caps: see `attention_shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_vector import Load, VectorUnit, span, splat, store
from fairy_compile.kernels.attention_shape import EMPTY, LOG2_E, MASKED, PAGE, AttentionShape

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

TILE = PAGE
"""Keys of a tile: a page of the cache."""

BLOCK_ROWS = 4


@dataclass(frozen=True)
class KeyTile:
    """Sixteen keys and values.

    Attributes:
        key, value: load (row in the tile, first element) as float32. ``key`` is asked for all
            sixteen rows, ``value`` for those below ``count``.
        count: rows that exist.
    """

    key: Load
    value: Load
    count: Expr


@dataclass(frozen=True)
class Visible:
    """Which of a tile's keys a row may see: ``first`` (None: 0) and on, before ``end``.

    Either may lie outside the tile.
    """

    end: Expr
    first: Expr | None = None


class QueryTile:
    """Scratch of up to ``rows`` query rows, and the code that works on it."""

    def __init__(self, unit: VectorUnit, shape: AttentionShape, rows: int) -> None:
        head_dim = shape.head_dim
        self.unit, self.dim, self.rows = unit.dividing(head_dim), head_dim, rows
        self.softcap, self.score_unit = shape.softcap, shape.score_unit
        self._q = T.alloc_buffer((rows * head_dim,), "float32")
        self._out = T.alloc_buffer((rows * head_dim,), "float32")
        self._peak = T.alloc_buffer((rows,), "float32")
        self._total = T.alloc_buffer((rows * TILE,), "float32")
        self._weights = T.alloc_buffer((min(rows, BLOCK_ROWS) * TILE,), "float32")

    def start(self, query: Load, count: Expr | int, sm_scale: Expr) -> None:
        """Load ``count`` query rows, zero the others, and forget earlier keys."""
        lanes = self.unit.lanes
        scale = splat(T.bind(T.abs(sm_scale) * T.float32(self.score_unit)), lanes)
        vec.fill(self._out, 0, self.rows * self.dim, 0.0, lanes)
        vec.fill(self._total, 0, self.rows * TILE, 0.0, TILE)
        vec.fill(self._peak, 0, self.rows, EMPTY, 1)
        if not isinstance(count, int):
            vec.fill(self._q, 0, self.rows * self.dim, 0.0, lanes)
        with T.serial(0, count) as row, T.serial(0, self.dim // lanes) as i:
            at = T.bind(i * lanes)
            store(self._q, span(row * self.dim + at, lanes), query(row, at) * scale)

    def attend(self, tile: KeyTile, count: Expr | int, visible: Callable[[Expr], Visible]) -> None:
        """Take in a tile of keys for the first ``count`` rows.

        Args:
            tile: the keys and values.
            count: rows to handle; if not a Python int, rounded up to whole blocks.
            visible: row -> the keys it may see.
        """
        for block, size in self._blocks(count):
            with block as row:
                self._score(row, size, tile.key)
                for i in range(size):
                    self._soften(T.bind(row + i), i, visible(row + i))
                self._accumulate(row, size, tile)

    def finish(self, row: Expr, save: Callable[[Expr, Expr], None]) -> Expr:
        """Save the row's attention by save(first element, lanes); return its log-sum-exp (log2)."""
        lanes = self.unit.lanes
        total = vec.lane_sums([self._total[span(row * TILE, TILE)]], TILE)
        some = T.bind(total > T.float32(0))
        inverse = T.bind(T.if_then_else(some, T.float32(1) / total, T.float32(0)))
        with T.serial(0, self.dim // lanes) as i:
            at = T.bind(i * lanes)
            save(at, self._out[span(row * self.dim + at, lanes)] * splat(inverse, lanes))
        return T.if_then_else(some, self._peak[row] + T.log2(total), T.float32(EMPTY))

    def _blocks(self, count: Expr | int) -> Iterator[tuple[AbstractContextManager[Expr], int]]:
        """Yield (block, rows): a loop over blocks of four, then two and one for what is left."""
        if not isinstance(count, int):
            yield _loop(T.floordiv(count + (BLOCK_ROWS - 1), BLOCK_ROWS)), BLOCK_ROWS
            return
        whole, size = count // BLOCK_ROWS, BLOCK_ROWS
        if whole:
            yield _loop(whole), BLOCK_ROWS
        done = whole * BLOCK_ROWS
        while done < count:
            size //= 2
            if count - done >= size:
                yield _once(done), size
                done += size

    def _score(self, first: Expr, size: int, key: Load) -> None:
        """Store the scores of a block: weights[i, j] = q[first + i] . key[j]."""
        lanes = self.unit.lanes
        keys = max(1, min(TILE, self.unit.sums // size))
        with T.serial(0, TILE // keys) as step:
            sums = vec.zeros(size * keys, lanes)
            with T.serial(0, self.dim // lanes) as chunk:
                at = T.bind(chunk * lanes)
                k = [T.bind(key(step * keys + j, at)) for j in range(keys)]
                for i in range(size):
                    q = T.bind(self._q[span((first + i) * self.dim + at, lanes)])
                    for j in range(keys):
                        total = sums[i * keys + j]
                        store(total, span(0, lanes), total[span(0, lanes)] + q * k[j])
            vectors = [s[span(0, lanes)] for s in sums]
            self._store_scores(vectors, keys, step)

    def _store_scores(self, vectors: list[Expr], keys: int, step: Expr) -> None:
        """Reduce accumulators [row][key] and store them at weights[row, step * keys + key]."""
        pack = min(len(vectors), self.unit.lanes)
        for start in range(0, len(vectors), pack):
            sums = vec.lane_sums(vectors[start : start + pack], self.unit.lanes)
            run = min(pack, keys)
            for offset in range(0, pack, run):
                row, key = divmod(start + offset, keys)
                part = sums
                if run < pack:
                    part = T.Shuffle([sums], list(range(offset, offset + run)))
                store(self._weights, span(row * TILE + step * keys + key, run), part)

    def _soften(self, row: Expr, slot: int, visible: Visible) -> None:
        """Turn a row's scores into weights 2^(s - peak), raising its peak where needed."""
        at = span(slot * TILE, TILE)
        keys = T.ramp(0, 1, TILE)
        scores = self._capped(self._weights[at])
        if visible.first is not None:
            hidden = keys < T.broadcast(visible.first, TILE)
            scores = T.bind(T.Select(hidden, splat(MASKED, TILE), scores))
        seen = keys < T.broadcast(visible.end, TILE)
        scores = T.bind(T.Select(seen, scores, splat(MASKED, TILE)))
        peak = vec.lane_max(scores, TILE)
        with T.If(peak > self._peak[row]), T.Then():
            self._rescale(row, vec.exp2(self._peak[row] - peak, 1))
            store(self._peak, row, peak)
        weights = vec.exp2(scores - splat(self._peak[row], TILE), TILE)
        store(self._weights, at, weights)
        total = span(row * TILE, TILE)
        store(self._total, total, self._total[total] + weights)

    def _capped(self, scores: Expr) -> Expr:
        """Return cap log2(e) tanh(s / cap) of sixteen scores that stand as 2 log2(e) s / cap."""
        if not self.softcap:
            return scores
        # tanh x = 1 - 2 / (e^2x + 1), which is 1 to float32 long before the power overflows.
        power = vec.exp2(T.min(scores, splat(64.0, TILE)), TILE)
        one = splat(1.0, TILE)
        tanh = one - splat(2.0, TILE) / (power + one)
        return T.bind(splat(self.softcap * LOG2_E, TILE) * tanh)

    def _rescale(self, row: Expr, factor: Expr) -> None:
        lanes = self.unit.lanes
        total = span(row * TILE, TILE)
        store(self._total, total, self._total[total] * splat(factor, TILE))
        with T.serial(0, self.dim // lanes) as i:
            at = span(row * self.dim + i * lanes, lanes)
            store(self._out, at, self._out[at] * splat(factor, lanes))

    def _accumulate(self, first: Expr, size: int, tile: KeyTile) -> None:
        """Add the weighted values of the tile to a block's outputs."""
        lanes = self.unit.lanes
        chunks = self.dim // lanes
        width = vec.divisor_at_most(chunks, self.unit.sums // size)
        with T.serial(0, chunks // width) as part:
            base = T.bind(part * (width * lanes))
            sums = [T.alloc_buffer((lanes,), "float32") for _ in range(size * width)]
            places = [
                ((first + i) * self.dim + base + c * lanes, sums[i * width + c])
                for i in range(size)
                for c in range(width)
            ]
            for at, total in places:
                store(total, span(0, lanes), self._out[span(at, lanes)])
            with T.serial(0, tile.count) as j:
                weights = [T.bind(self._weights[i * TILE + j]) for i in range(size)]
                for c in range(width):
                    value = T.bind(tile.value(j, base + c * lanes))
                    for i, weight in enumerate(weights):
                        total = sums[i * width + c]
                        new = total[span(0, lanes)] + splat(weight, lanes) * value
                        store(total, span(0, lanes), new)
            for at, total in places:
                store(self._out, span(at, lanes), total[span(0, lanes)])


@contextmanager
def _loop(count: Expr | int) -> Iterator[Expr]:
    with T.serial(0, count) as block:
        yield T.bind(block * BLOCK_ROWS)


@contextmanager
def _once(first: int) -> Iterator[Expr]:
    yield T.int32(first)


def log_sum_exp_weights(first: Expr, second: Expr) -> tuple[Expr, Expr, Expr]:
    """Return the weights of two partial results and the log-sum-exp (log2) of both together."""
    peak = T.bind(T.max(first, second))
    a, b = vec.exp2(first - peak, 1), vec.exp2(second - peak, 1)
    total = T.bind(a + b)
    return T.bind(a / total), T.bind(b / total), T.bind(peak + T.log2(total))


def local_layer(shape: AttentionShape, sm_scale: Expr) -> Expr | None:
    """Return whether the layer of this call has a sliding window, or None if no layer has one."""
    return None if shape.window is None else T.bind(sm_scale < T.float32(0))


def first_key(shape: AttentionShape, local: Expr, position: Expr, offset: Expr) -> Expr:
    """Return the first key a query may see, 0 where the layer has no window.

    Args:
        shape: with a window.
        local: see `local_layer`.
        position: of the query in its sequence.
        offset: position of key 0; the answer may be beyond the last key there is.
    """
    lowest = T.max(position - (shape.window - 1) - offset, T.int32(0))
    return T.if_then_else(local, lowest, T.int32(0))


def page_tile(pages: Buffer, page: Expr, head: Expr, count: Expr, lanes: int) -> KeyTile:
    """Return the keys and values of a head in a page: pages[page, 0 or 1, head, row, element]."""
    return KeyTile(
        key=lambda row, first: vec.load(pages, (page, 0, head, row, first), lanes),
        value=lambda row, first: vec.load(pages, (page, 1, head, row, first), lanes),
        count=count,
    )
