"""`Prefixes`: sequences of ended answers, kept for prompts that begin like them.

What a prompt shares with a sequence in the KV cache need not be run again. In which way depends on
whether answers have to be those of a single stream, bit for bit:

- Not exact: a prompt forks the sequence with the longest common prefix, also one that is running,
  at any token. Pages are shared; one that is cut in two is copied. The runtime then attends to the
  shared pages and to a sequence's own apart and merges the two, which rounds differently.
- Exact: a prompt takes a kept sequence over and continues it, so that its pages lie as they would
  without reuse. Keys and values are those of a prompt run from its start only where calls of
  `Engine.prefill` began and ended at the same tokens, so whole chunks of a prompt are reused, and
  nothing that was decoded.

Kept sequences give way, the least recently used first, whenever an answer needs their place or
their pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fairy_compile.runtime.pages import PAGE_SIZE

if TYPE_CHECKING:
    from fairy_compile.runtime.engine import Engine


class Prefixes:
    """Kept sequences of one engine. Not safe for threads.

    Attributes:
        exact: see the module's docstring.
        pages: pages of the kept sequences, counting shared ones for each.
    """

    def __init__(self, engine: Engine, *, exact: bool):
        self.exact = exact
        self.pages = 0
        self._engine = engine
        self._kept: OrderedDict[int, list[int]] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, sequence: int, tokens: Sequence[int], prompt: int) -> None:
        """Keep what of a sequence can be reused, and forget the rest.

        Args:
            sequence: with exactly ``tokens`` in the cache.
            tokens: prompt and answer, as far as they have been run.
            prompt: length of the prompt.
        """
        useful = list(tokens)
        if self.exact:
            useful = useful[: min(prompt, len(useful)) // self._engine.chunk * self._engine.chunk]
        elif covering := self._find(lambda kept: kept[: len(useful)] == useful):
            self._kept.move_to_end(covering)
            useful = []
        if not useful:
            self._engine.remove_sequence(sequence)
            return
        if not self.exact:
            while (covered := self._find(lambda kept: useful[: len(kept)] == kept)) is not None:
                self._drop(covered)
        self._engine.popn(sequence, len(tokens) - len(useful))
        self._kept[sequence] = useful
        self.pages += _pages(useful)

    def begin(
        self,
        prompt: Sequence[int],
        running: Mapping[int, Sequence[int]],
        fits: Callable[[int, int], bool],
    ) -> tuple[int, int]:
        """Return a sequence for ``prompt`` and how many of its tokens that has already.

        Args:
            prompt: one token or more; the last is never reused, since its logits are needed.
            running: sequences of running answers and the tokens that have been run of them.
            fits: tells whether an answer to the prompt can start beside so many kept sequences
                with so many pages; must be true for none.
        """
        parent, shared = self._longest(prompt, {} if self.exact else running)
        kept = parent is not None and parent in self._kept
        if kept:
            self._kept.move_to_end(parent)
        if kept and self.exact:
            self._take(parent, shared)
        self._make_room(fits, spare=parent if kept and not self.exact else None)
        if parent is None:
            return self._engine.add_sequence(), 0
        if self.exact:
            return parent, shared
        if kept and not fits(len(self._kept), self.pages):
            self._take(parent, shared)
            return parent, shared
        return self._engine.fork(parent, shared), shared

    def clear(self) -> None:
        """Forget all kept sequences."""
        for sequence in list(self._kept):
            self._drop(sequence)

    def _longest(
        self, prompt: Sequence[int], running: Mapping[int, Sequence[int]]
    ) -> tuple[int | None, int]:
        """Return the sequence that has most of ``prompt``, and how much of it can be reused."""
        most = len(prompt) - 1
        unit = self._engine.chunk if self.exact else 1
        best: tuple[int | None, int] = (None, 0)
        for sequence, tokens in (*self._kept.items(), *running.items()):
            shared = min(common_length(prompt, tokens), most) // unit * unit
            if shared > best[1]:
                best = (sequence, shared)
        return best

    def _take(self, sequence: int, tokens: int) -> None:
        """Stop to keep a sequence, of which the first ``tokens`` tokens go on."""
        length = self._release(sequence)
        self._engine.popn(sequence, length - tokens)

    def _make_room(self, fits: Callable[[int, int], bool], spare: int | None) -> None:
        for sequence in list(self._kept):
            if fits(len(self._kept), self.pages):
                return
            if sequence != spare:
                self._drop(sequence)

    def _drop(self, sequence: int) -> None:
        self._release(sequence)
        self._engine.remove_sequence(sequence)

    def _release(self, sequence: int) -> int:
        tokens = self._kept.pop(sequence)
        self.pages -= _pages(tokens)
        return len(tokens)

    def _find(self, matches: Callable[[list[int]], bool]) -> int | None:
        return next((s for s, tokens in self._kept.items() if matches(tokens)), None)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def _pages(tokens: Sequence[int]) -> int:
    return -(-len(tokens) // PAGE_SIZE)
