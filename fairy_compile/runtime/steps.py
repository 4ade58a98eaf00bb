"""Calls of a library's model functions: which, and with what arguments.

An `Engine` asks for a prefill or a decode step of tokens whose pages its cache has taken. How the
library is told of them differs: `CacheSteps` hands it the runtime's cache, `PageSteps` tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from fairy_compile.artifact.contract import (
    ALLOC_PAGES,
    BATCH_DECODE_PAGES,
    DECODE_PAGES,
    EXACT_DECODE,
    PREFILL_PAGES,
)
from fairy_compile.runtime.library import ModelLibrary
from fairy_compile.runtime.pages import PAGE_SIZE, OwnPages, Pages, RuntimePages, Tables, pages_of
from fairy_compile.runtime.pinned import PinnedArray

Call = tuple[str, tuple[Any, ...]]
"""Name of a library function that returns a tuple, logits first, and its arguments."""


class Steps(Protocol):
    """Who prepares calls.

    Attributes:
        pages: what the cache drives.
    """

    pages: Pages

    def prefill(self, ids: np.ndarray, logit_rows: np.ndarray | None) -> Call:
        """Return the prefill of ``ids`` int32 (n,), of the sequences ``pages`` were told last.

        Args:
            ids: tokens of one sequence after the other.
            logit_rows: int32, rows that get logits; None is the last one of a single sequence.
        """

    def decode(self, ids: np.ndarray, *, exact: bool = False) -> Call:
        """Return the step that decodes ``ids`` int32 (b,); see `Engine.decode`."""


class CacheSteps:
    """Steps over the runtime's cache, as the MLC engine makes them."""

    def __init__(self, library: ModelLibrary, params: Any, sizes: Sequence[int]):
        """Create the cache.

        Args:
            library: the library.
            params: its parameters.
            sizes: sequences, tokens in all, tokens of a prefill call.
        """
        import tvm

        self._library, self._params = library, params
        shapes = [tvm.runtime.ShapeTuple([size]) for size in (*sizes, PAGE_SIZE, 0)]
        self.pages = RuntimePages(library.call("create_tir_paged_kv_cache", *shapes))

    def prefill(self, ids: np.ndarray, logit_rows: np.ndarray | None) -> Call:
        """See `Steps`."""
        x, common = self._embed(ids, batch=1), (self.pages.handle, self._params)
        if logit_rows is None:
            return "prefill", (x, *common)
        return "batch_prefill", (x, self._library.to_device(logit_rows), *common)

    def decode(self, ids: np.ndarray, *, exact: bool = False) -> Call:
        """See `Steps`."""
        apart = exact and self._library.has(EXACT_DECODE)
        name = "decode" if len(ids) == 1 else EXACT_DECODE if apart else "batch_decode"
        return name, (self._embed(ids, batch=len(ids)), self.pages.handle, self._params)

    def _embed(self, ids: np.ndarray, batch: int) -> Any:
        """Return the embeddings of ``ids`` as a (batch, len / batch, hidden) tensor."""
        on_device = self._library.to_device(ids)
        x = self._library.call("embed", on_device, self._params, tokens=len(ids))
        return x._create_view((batch, len(ids) // batch, int(x.shape[-1])))


class PageSteps:
    """Steps whose pages are arguments, see `models.page_tables`.

    What decode steps take lies at one place, so that they can be recorded as CUDA graphs.
    """

    def __init__(self, library: ModelLibrary, params: Any, sizes: Sequence[int]):
        """Allocate pages and tables; see `CacheSteps`."""
        import tvm

        most_sequences, tokens, _ = sizes
        self._library, self._params = library, params
        count = pages_of(tokens) + 1  # popn copies a page before it frees one
        self._layers = library.call(ALLOC_PAGES, tvm.runtime.ShapeTuple([count]))
        # Not a method of ours: what refers to itself is freed late, and with it the weights.
        self.pages = OwnPages(count, partial(_copy_page, self._layers))
        self._inputs = StepInputs(library.device, most_sequences, count)

    def prefill(self, ids: np.ndarray, logit_rows: np.ndarray | None) -> Call:
        """See `Steps`."""
        tables, put = self.pages.tables(), self._library.to_device
        last = np.array([len(ids) - 1], np.int32) if logit_rows is None else logit_rows
        offsets = np.zeros(len(tables.last_page), np.int32)
        *arrays, rows = self._upload(
            *(ids, tables.positions, tables.places, tables.indptr, tables.values),
            *(tables.last_page, offsets, tables.rows),
        )
        return PREFILL_PAGES, (*arrays, put(last), rows, self._layers, self._params)

    def _upload(self, *arrays: np.ndarray) -> list[Any]:
        """Return copies of int32 arrays on the device, made by one copy.

        Kernels must take all but the first by an offset.
        """
        begins, end = [], 0
        for array in arrays:
            begins.append(end)
            end += _aligned(len(array))
        packed = np.zeros(end, np.int32)
        for begin, array in zip(begins, arrays, strict=True):
            packed[begin : begin + len(array)] = array
        there = self._library.to_device(packed)
        return [
            _view(there, len(array), 4 * begin) for begin, array in zip(begins, arrays, strict=True)
        ]

    def decode(self, ids: np.ndarray, *, exact: bool = False) -> Call:
        """See `Steps`; ``exact`` asks for functions that libraries for GPUs do not have."""
        name = DECODE_PAGES if len(ids) == 1 else BATCH_DECODE_PAGES
        arrays = self._inputs.write(ids, self.pages.tables())
        return name, (*arrays, self._layers, self._params)


def _copy_page(layers: Sequence[Any], source: int, target: int) -> None:
    """Copy the keys and values of one page of every layer to another."""
    for layer in layers:
        page = [1, *map(int, layer.shape[1:])]
        nbytes = int(np.prod(page)) * np.dtype(str(layer.dtype)).itemsize
        here, there = (
            layer._create_view(page, relative_byte_offset=i * nbytes) for i in (source, target)
        )
        here.copyto(there)


class StepInputs:
    """What decode steps read besides weights and pages, at one place of the device's memory.

    Hosts write it through memory the device copies from while they go on.
    """

    _SLOTS = 64  # copies that may be on their way

    def __init__(self, device: Any, most_sequences: int, pages: int):
        """Allocate room for steps of up to ``most_sequences``, which have up to ``pages``."""
        import tvm

        self._device, self._pages = device, pages
        # Kernels take all but the first by an offset.
        sections = {
            "ids": most_sequences,
            "positions": most_sequences,
            "places": most_sequences,
            "last_page": most_sequences,
            "offsets": most_sequences,
            "indptr": most_sequences + 1,
            "values": pages,
        }
        self._begin, end = {}, 0
        for name, size in sections.items():
            self._begin[name] = end
            end += _aligned(size)
        self._size = end
        self._inputs = tvm.runtime.empty((end,), "int32", device)
        self._host = PinnedArray(self._SLOTS * end, "int32", device)
        self._rows = self._host.array.reshape(self._SLOTS, end)
        self._next = 0
        self._sources: dict[tuple[int, int], Any] = {}
        self._targets: dict[tuple[int, int], tuple[Any, tuple[Any, ...]]] = {}

    def write(self, ids: np.ndarray, tables: Tables) -> tuple[Any, ...]:
        """Write the inputs of a step and return them as arrays on the device.

        Their order is that of `models.page_tables.page_specs`. The number of pages is rounded up to
        a power of two, so that there are few different ones.
        """
        slot = self._next
        self._next = (slot + 1) % self._SLOTS
        if self._next == 0:
            self._device.sync()  # nothing is on its way any more
        row = self._rows[slot]
        for name, begin in self._begin.items():
            if name != "offsets":  # which are 0
                values = ids if name == "ids" else getattr(tables, name)
                row[begin : begin + len(values)] = values
        count = min(self._pages, max(PAGE_SIZE, 1 << (len(tables.values) - 1).bit_length()))
        target, arrays = self._targets_of(len(ids), count)
        self._source_of(slot, count).copyto(target)
        return arrays

    def _source_of(self, slot: int, count: int) -> Any:
        """Return what a slot holds for a step with ``count`` pages."""
        key = (slot, count)
        if key not in self._sources:
            used = self._begin["values"] + count
            self._sources[key] = _view(self._host.tensor, used, 4 * slot * self._size)
        return self._sources[key]

    def _targets_of(self, batch: int, count: int) -> tuple[Any, tuple[Any, ...]]:
        """Return where that goes, as a whole and as the arrays of a step of ``batch``."""
        key = (batch, count)
        if key not in self._targets:
            sizes = {"indptr": batch + 1, "values": count}
            arrays = tuple(
                _view(self._inputs, sizes.get(name, batch), 4 * self._begin[name])
                for name in (
                    *("ids", "positions", "places"),
                    *("indptr", "values", "last_page", "offsets"),
                )
            )
            whole = _view(self._inputs, self._begin["values"] + count, 0)
            self._targets[key] = whole, arrays
        return self._targets[key]


def _aligned(size: int) -> int:
    """Return a number of elements rounded up to 256 bytes, for the address of what follows."""
    return -(-size // 64) * 64


def _view(array: Any, size: int, offset: int) -> Any:
    """Return ``size`` elements from ``offset`` bytes on."""
    return array._create_view((size,), relative_byte_offset=offset)
