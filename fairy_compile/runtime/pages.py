"""Who has which pages of a KV cache: the runtime's cache, or tables of our own.

Both do what they are told: `runtime.kv_cache.KVCache` has checked it before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Protocol

import numpy as np

PAGE_SIZE = 16
"""Tokens per page; the MLC engine accepts no other value."""


def pages_of(tokens: int) -> int:
    """Return how many pages ``tokens`` take."""
    return -(-tokens // PAGE_SIZE)


class Pages(Protocol):
    """What a cache does with pages."""

    def available(self) -> int:
        """Return how many pages are free."""

    def add(self, sequence: int) -> None:
        """Start an empty sequence."""

    def remove(self, sequence: int) -> None:
        """Free the pages only ``sequence`` has."""

    def fork(self, parent: int, child: int, position: int) -> None:
        """Start ``child`` with the first ``position`` tokens of ``parent``."""

    def popn(self, sequence: int, count: int) -> None:
        """Drop the last ``count`` tokens."""

    def begin(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Take pages for ``counts[i]`` more tokens of ``sequences[i]``."""

    def end(self) -> None:
        """Say that the model has run on what `begin` was told."""


class RuntimePages:
    """The runtime's cache, driven by its global ``vm.builtin.kv_state_*`` functions.

    Attributes:
        handle: the cache, an argument of the model functions.
    """

    def __init__(self, handle: Any):
        import tvm

        self.handle = handle
        state = "vm.builtin.kv_state_"
        self._add = tvm.get_global_func(state + "add_sequence")
        self._remove = tvm.get_global_func(state + "remove_sequence")
        self._fork = tvm.get_global_func(state + "fork_sequence")
        self._popn = tvm.get_global_func(state + "popn")
        self._begin = tvm.get_global_func(state + "begin_forward")
        self._end = tvm.get_global_func(state + "end_forward")
        self._available = tvm.get_global_func(
            "vm.builtin.attention_kv_cache_get_num_available_pages"
        )
        self._shape = tvm.runtime.ShapeTuple

    def available(self) -> int:
        """See `Pages`, like the next ones."""
        return int(self._available(self.handle))

    def add(self, sequence: int) -> None:
        """See `Pages`."""
        self._add(self.handle, sequence)

    def remove(self, sequence: int) -> None:
        """See `Pages`."""
        self._remove(self.handle, sequence)

    def fork(self, parent: int, child: int, position: int) -> None:
        """See `Pages`."""
        self._fork(self.handle, parent, child, position)

    def popn(self, sequence: int, count: int) -> None:
        """See `Pages`."""
        self._popn(self.handle, sequence, count)

    def begin(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """See `Pages`."""
        self._begin(self.handle, self._shape(sequences), self._shape(counts))

    def end(self) -> None:
        """See `Pages`."""
        self._end(self.handle)


@dataclass(frozen=True)
class Tables:
    """What a model function is told of the rows it gets, all int32; see `models.page_tables`."""

    positions: np.ndarray
    places: np.ndarray
    indptr: np.ndarray
    values: np.ndarray
    last_page: np.ndarray
    rows: np.ndarray


class OwnPages:
    """Pages as numbers, and which sequences have them.

    All but the last page of a sequence may be shared with others. The last one is its own unless it
    is full, so that new tokens go to pages no other sequence has.
    """

    def __init__(self, count: int, copy: Callable[[int, int], None]):
        """Start with ``count`` free pages.

        Args:
            count: of pages.
            copy: copies the content of one page to another.
        """
        self._free = deque(range(count))
        self._users = [0] * count
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._running: tuple[Sequence[int], Sequence[int]] = ((), ())
        self._copy = copy

    def available(self) -> int:
        """See `Pages`, like the next ones."""
        return len(self._free)

    def add(self, sequence: int) -> None:
        """See `Pages`."""
        self._pages[sequence], self._lengths[sequence] = [], 0

    def remove(self, sequence: int) -> None:
        """See `Pages`."""
        for page in self._pages.pop(sequence):
            self._drop(page)
        del self._lengths[sequence]

    def fork(self, parent: int, child: int, position: int) -> None:
        """See `Pages`."""
        pages = self._pages[parent][: pages_of(position)]
        for page in pages:
            self._users[page] += 1
        self._pages[child], self._lengths[child] = pages, position
        self._own_last(child)

    def popn(self, sequence: int, count: int) -> None:
        """See `Pages`."""
        left = self._lengths[sequence] - count
        pages = self._pages[sequence]
        while len(pages) > pages_of(left):
            self._drop(pages.pop())
        self._lengths[sequence] = left
        self._own_last(sequence)

    def begin(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """See `Pages`."""
        for sequence, count in zip(sequences, counts, strict=True):
            length = self._lengths[sequence] + count
            pages = self._pages[sequence]
            while len(pages) < pages_of(length):
                pages.append(self._take())
            self._lengths[sequence] = length
        self._running = (tuple(sequences), tuple(counts))

    def end(self) -> None:
        """See `Pages`."""

    def tables(self) -> Tables:
        """Return the tables of the sequences and tokens `begin` was told last."""
        sequences, counts = self._running
        lengths = [self._lengths[s] for s in sequences]
        pages = [self._pages[s] for s in sequences]
        if max(counts) == 1:  # a step of decode, which NumPy would take longer for
            positions: Any = [length - 1 for length in lengths]
            places: Any = [
                own[-1] * PAGE_SIZE + at % PAGE_SIZE
                for own, at in zip(pages, positions, strict=True)
            ]
        else:
            ranges = [
                np.arange(length - count, length)
                for length, count in zip(lengths, counts, strict=True)
            ]
            positions = np.concatenate(ranges)
            places = np.concatenate(
                [
                    np.array(own)[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
                    for own, at in zip(pages, ranges, strict=True)
                ]
            )
        indptr = list(accumulate(map(len, pages), initial=0))
        return Tables(
            positions=np.asarray(positions, np.int32),
            places=np.asarray(places, np.int32),
            indptr=np.array(indptr, np.int32),
            values=np.fromiter(chain.from_iterable(pages), np.int32, indptr[-1]),
            last_page=np.array([(n - 1) % PAGE_SIZE + 1 for n in lengths], np.int32),
            rows=np.array(list(accumulate(counts, initial=0)), np.int32),
        )

    def _take(self) -> int:
        page = self._free.popleft()
        self._users[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    def _own_last(self, sequence: int) -> None:
        """Copy a last page that is partly filled and shared."""
        pages = self._pages[sequence]
        if self._lengths[sequence] % PAGE_SIZE and self._users[pages[-1]] > 1:
            shared, pages[-1] = pages[-1], self._take()
            self._copy(shared, pages[-1])
            self._drop(shared)
