"""Sorting probabilities on GPUs: the bitonic sort (Batcher, 1968) of an engine's sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import (
    THREADS,
    build_function,
    launch,
    shared,
    store,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

# Entries of a run that a thread group sorts in shared memory.
SORT_GROUP = 512


def build_argsort(vocab: int) -> PrimFunc:
    """Return ``argsort_probs``: a bitonic sort (Batcher, 1968) of every row, likeliest first.

    Arguments: probs (b, vocab), sorted_probs (b, vocab), sorted_index int32 (b, vocab), and the
    workspace keys float32 (b, p), values int32 (b, p), with p = `sort_width` (vocab). Equal
    probabilities are ordered by index. Runs of up to `SORT_GROUP` entries are sorted in shared
    memory.
    """
    width = sort_width(vocab)
    group = min(SORT_GROUP, width)

    def body() -> None:
        rows = T.int32()
        probs = T.arg("probs", T.buffer((rows, vocab), "float32"))
        sorted_probs = T.arg("sorted_probs", T.buffer((rows, vocab), "float32"))
        sorted_index = T.arg("sorted_index", T.buffer((rows, vocab), "int32"))
        keys = T.arg("keys", T.buffer((rows, width), "float32"))
        values = T.arg("values", T.buffer((rows, width), "int32"))
        sort = _BitonicSort(rows, keys, values, width, group)
        sort.fill(probs, vocab)
        sort.groups()
        first, last = _log2(group), _log2(width)
        if last > first:
            with T.serial(first, last) as k:  # runs of 2^k become runs of 2^(k + 1)
                with T.serial(0, k - first + 1) as j:
                    sort.step(k + 1, k - j)
                sort.merge(k + 1)
        sort.cut(sorted_probs, sorted_index, vocab)

    return build_function("argsort_probs", body).without_attr("global_symbol")


def sort_width(vocab: int) -> int:
    """Return the entries of a row in the sort's workspace, a power of two."""
    return 1 << max(1, (vocab - 1).bit_length())


class _BitonicSort:
    """The launches of a sort; runs are numbered by the logarithms of their sizes."""

    def __init__(self, rows: Expr, keys: Buffer, values: Buffer, width: int, group: int) -> None:
        self.rows, self.keys, self.values = rows, keys, values
        self.width, self.group = width, group

    def fill(self, probs: Buffer, vocab: int) -> None:
        """Copy a row; padding is -1, so that it sorts behind every probability."""

        def copy(row: Expr, i: Expr) -> None:
            key = T.if_then_else(i < vocab, probs[row, T.min(i, vocab - 1)], T.float32(-1))
            store(self.keys, (row, i), key)
            store(self.values, (row, i), i)

        self._each(self.width, copy)

    def groups(self) -> None:
        """Sort runs of ``group`` entries, alternately descending and ascending."""

        def sort(base: Expr, thread: Expr, keys: Buffer, values: Buffer) -> None:
            for size in range(1, _log2(self.group) + 1):
                for stride in reversed(range(size)):
                    low = T.bind(_low(thread, T.int32(stride)))
                    descending = T.bind(_descending(base + low, T.int32(size)))
                    _order(keys, values, (low,), (low + (1 << stride),), descending)

        self._in_groups(sort)

    def step(self, size: Expr, stride: Expr) -> None:
        """Order entries 2^stride apart, in runs of 2^size."""

        def order(row: Expr, i: Expr) -> None:
            low = T.bind(_low(i, stride))
            high = T.bind(low + T.shift_left(T.int32(1), stride))
            descending = T.bind(_descending(low, size))
            _order(self.keys, self.values, (row, low), (row, high), descending)

        self._each(self.width // 2, order)

    def merge(self, size: Expr) -> None:
        """Do all steps within groups, of runs of 2^size."""

        def merge(base: Expr, thread: Expr, keys: Buffer, values: Buffer) -> None:
            descending = T.bind(_descending(base, size))
            for stride in reversed(range(_log2(self.group))):
                low = T.bind(_low(thread, T.int32(stride)))
                _order(keys, values, (low,), (low + (1 << stride),), descending)

        self._in_groups(merge)

    def cut(self, probs: Buffer, index: Buffer, vocab: int) -> None:
        """Copy a row without its padding."""

        def copy(row: Expr, i: Expr) -> None:
            with when(i < vocab):
                store(probs, (row, i), self.keys[row, i])
                store(index, (row, i), self.values[row, i])

        self._each(self.width, copy)

    def _each(self, count: int, body: Callable[[Expr, Expr], None]) -> None:
        threads = min(THREADS, count)
        extents = {"blockIdx.y": self.rows, "blockIdx.x": count // threads, "threadIdx.x": threads}
        with launch(extents) as (row, block, thread):
            body(row, T.bind(block * threads + thread))

    def _in_groups(self, body: Callable[[Expr, Expr, Buffer, Buffer], None]) -> None:
        """Run body(first entry, thread, keys, values) over groups brought to shared memory."""
        threads = self.group // 2
        extents = {
            "blockIdx.y": self.rows,
            "blockIdx.x": self.width // self.group,
            "threadIdx.x": threads,
        }
        with launch(extents) as (row, block, thread):
            keys, values = shared((self.group,)), shared((self.group,), "int32")
            base = T.bind(block * self.group)
            for half in (0, threads):
                store(keys, thread + half, self.keys[row, base + thread + half])
                store(values, thread + half, self.values[row, base + thread + half])
            body(base, thread, keys, values)
            for half in (0, threads):
                store(self.keys, (row, base + thread + half), keys[thread + half])
                store(self.values, (row, base + thread + half), values[thread + half])


def _order(
    keys: Buffer, values: Buffer, low: tuple[Any, ...], high: tuple[Any, ...], descending: Expr
) -> None:
    """Swap two entries unless they stand as ``descending`` (0 or 1) demands."""
    key_low, key_high = T.bind(keys[low]), T.bind(keys[high])
    value_low, value_high = T.bind(values[low]), T.bind(values[high])
    # Equal probabilities are ordered by index, so that the order is a total one.
    first = T.Or(key_low > key_high, T.And(key_low == key_high, value_low < value_high))
    with when(T.if_then_else(first, T.int32(1), T.int32(0)) != descending):
        store(keys, low, key_high)
        store(keys, high, key_low)
        store(values, low, value_high)
        store(values, high, value_low)


def _low(pair: Expr, stride: Expr) -> Expr:
    """Return the lower entry of a pair of entries 2^stride apart, pairs being numbered from 0."""
    run = T.shift_right(pair, stride)
    inside = pair - T.shift_left(run, stride)
    return T.shift_left(run, stride + 1) + inside


def _descending(entry: Expr, size: Expr) -> Expr:
    """Return 1 where the run of 2^size that ``entry`` lies in is to descend, else 0."""
    return 1 - T.bitwise_and(T.shift_right(entry, size), T.int32(1))


def _log2(power: int) -> int:
    return power.bit_length() - 1
