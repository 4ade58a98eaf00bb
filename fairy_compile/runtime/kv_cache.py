"""`KVCache`: the paged key/value cache of a model library.

Every change is checked against limits here, before `runtime.pages` makes it: the runtime's own
checks come after it has changed its state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fairy_compile.errors import FairyError
from fairy_compile.runtime.pages import PAGE_SIZE, Pages, pages_of


class KVCache:
    """Sequences and their lengths in one paged cache.

    Attributes:
        context: most tokens of one sequence.
        capacity: tokens all sequences can hold together.
        max_sequences: most sequences at a time.
        pages: of all sequences and of none.
        peak_pages: most pages that were in use at a time.
    """

    def __init__(self, owner: Pages, *, context: int, capacity: int, max_sequences: int):
        self.context = context
        self.capacity = capacity
        self.max_sequences = max_sequences
        self._owner = owner
        self._lengths: dict[int, int] = {}
        self._next_id = 0
        self.pages = owner.available()
        self.peak_pages = 0

    @property
    def sequences(self) -> list[int]:
        """Ids of the sequences in the cache."""
        return list(self._lengths)

    @property
    def used_pages(self) -> int:
        """Pages in use; forked sequences share theirs."""
        return self.pages - self._owner.available()

    def length(self, sequence: int) -> int:
        """Return the tokens of ``sequence`` in the cache."""
        self._check_known(sequence)
        return self._lengths[sequence]

    def add(self) -> int:
        """Start an empty sequence and return its id."""
        sequence = self._new_id()
        self._owner.add(sequence)
        self._lengths[sequence] = 0
        return sequence

    def remove(self, sequence: int) -> None:
        """Forget ``sequence`` and free the pages only it used."""
        self._check_known(sequence)
        self._owner.remove(sequence)
        del self._lengths[sequence]

    def fork(self, parent: int, position: int | None = None) -> int:
        """Start a sequence with the first ``position`` tokens of ``parent`` (default: all)."""
        length = self.length(parent)
        position = length if position is None else position
        if not 0 <= position <= length:
            raise FairyError(f"fork position is {position}; sequence {parent} has {length} tokens")
        child = self._new_id()
        self._check_free(1)  # a page that is cut in two is copied
        self._owner.fork(parent, child, position)
        self._lengths[child] = position
        return child

    def popn(self, sequence: int, count: int) -> None:
        """Drop the last ``count`` tokens of ``sequence``."""
        length = self.length(sequence)
        if not 0 <= count <= length:
            raise FairyError(f"cannot drop {count} tokens of a sequence that has {length}")
        self._owner.popn(sequence, count)
        self._lengths[sequence] = length - count

    @contextmanager
    def forward(self, sequences: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
        """Append ``counts[i]`` tokens to ``sequences[i]`` by the model calls inside the block.

        If the block fails the sequences keep the length they had.
        """
        self.check_room(sequences, counts)
        self._owner.begin(sequences, counts)
        self.peak_pages = max(self.peak_pages, self.used_pages)
        try:
            yield
        except BaseException:
            self._owner.end()
            for sequence, count in zip(sequences, counts, strict=True):
                self._owner.popn(sequence, count)
            raise
        self._owner.end()
        for sequence, count in zip(sequences, counts, strict=True):
            self._lengths[sequence] += count

    def check_room(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Raise `FairyError` unless ``counts[i]`` more tokens of ``sequences[i]`` fit."""
        if len(set(sequences)) != len(sequences):
            raise FairyError(f"a batch names a sequence twice: {list(sequences)}")
        needed = 0
        for sequence, count in zip(sequences, counts, strict=True):
            length = self.length(sequence)
            if length + count > self.context:
                raise FairyError(
                    f"the text has {length + count} tokens, but the context holds {self.context}; "
                    "shorten the prompt, or load the model with a larger context"
                )
            # The last, partly filled page of a sequence is never shared, so this is exact.
            needed += pages_of(length + count) - pages_of(length)
        self._check_free(needed)

    def _check_free(self, pages: int) -> None:
        # One page stays free: popn of a forked sequence copies a page before it frees one.
        free = self._owner.available() - 1
        if pages > free:
            raise FairyError(
                f"the KV cache has room for {free * PAGE_SIZE} more tokens of {self.capacity}, "
                f"but {pages * PAGE_SIZE} are needed; remove a sequence, or load the model with "
                "fewer max_sequences or a larger context"
            )

    def _new_id(self) -> int:
        if len(self._lengths) >= self.max_sequences:
            raise FairyError(
                f"{len(self._lengths)} sequences are running; allowed: {self.max_sequences} "
                "(max_sequences of load)"
            )
        self._next_id += 1
        return self._next_id - 1

    def _check_known(self, sequence: int) -> None:
        if sequence not in self._lengths:
            raise FairyError(f"there is no sequence {sequence!r}; running: {self.sequences}")
