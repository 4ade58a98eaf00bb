"""`Generation`: the loop that turns logits into text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.runtime.engine import Engine
from fairy_compile.runtime.sampler import Sampler
from fairy_compile.runtime.text import StopFilter, TextStream

FinishReason = Literal["stop", "length", "context", "cancelled"]


class Generation:
    """One answer: an iterator over pieces of its text.

    Attributes:
        tokens: tokens drawn so far, without the one that ended the answer.
        text: text given out so far.
        finish_reason: None while running; ``stop`` (end token or stop string), ``length``
            (max_tokens), ``context`` (the context is full), or ``cancelled`` (closed early).
    """

    def __init__(
        self,
        engine: Engine,
        sequence: Callable[[], int],
        prompt: Sequence[int],
        sampler: Sampler,
        text: TextStream,
        *,
        max_tokens: int,
        stop_tokens: Collection[int] = (),
        stop: Iterable[str] = (),
        on_end: Callable[[int], None] = lambda sequence: None,
        on_feed: Callable[[Sequence[int]], None] = lambda tokens: None,
    ):
        """Prepare an answer; nothing runs before the first piece is asked for.

        Args:
            engine: computes the logits.
            sequence: returns the sequence to append to; called when the answer starts.
            prompt: tokens to append before the first is drawn, one or more.
            sampler: draws.
            text: decodes.
            max_tokens: most tokens to draw.
            stop_tokens: tokens that end the answer.
            stop: strings that end the answer and are not shown.
            on_end: called with the sequence when the answer has ended in any way.
            on_feed: called with tokens that have just become part of the sequence.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise FairyError(f"max_tokens is {max_tokens!r}; allowed: 1 or more")
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._engine = engine
        self._start = sequence
        self._prompt = list(prompt)
        self._sampler = sampler
        self._stream = text
        self._filter = StopFilter(stop)
        self._max_tokens = max_tokens
        self._stop_tokens = frozenset(stop_tokens)
        self._on_end = on_end
        self._on_feed = on_feed
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer here; what was given out stays valid."""
        self._pieces.close()
        self.finish_reason = self.finish_reason or "cancelled"

    def read(self) -> str:
        """Run to the end and return the whole text."""
        for _ in self:
            pass
        return self.text

    def _run(self) -> Iterator[str]:
        sequence = self._start()
        try:
            logits = self._engine.prefill(sequence, self._prompt)
            self._on_feed(self._prompt)
            for piece in self._answer(sequence, logits):
                if piece:
                    self.text += piece
                    yield piece
        except BaseException:
            self.finish_reason = self.finish_reason or "cancelled"
            raise
        finally:
            self._on_end(sequence)

    def _answer(self, sequence: int, logits: np.ndarray) -> Iterator[str]:
        while True:
            token = self._sampler.sample(logits)
            if token in self._stop_tokens:
                self.finish_reason = "stop"
                break
            self.tokens.append(token)
            yield self._filter.push(self._stream.push(token))
            if self._filter.stopped:
                self.finish_reason = "stop"
                return
            if len(self.tokens) >= self._max_tokens:
                self.finish_reason = "length"
                break
            if self._engine.length(sequence) >= self._engine.context:
                self.finish_reason = "context"
                break
            logits = self._engine.decode([sequence], [token])[0]
            self._on_feed([token])
        yield self._filter.push(self._stream.finish())
        if self._filter.stopped:
            self.finish_reason = "stop"
        yield self._filter.finish()
