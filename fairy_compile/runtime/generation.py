"""`Generation`: the loop that turns logits into text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fairy_compile.config import is_whole
from fairy_compile.errors import FairyError
from fairy_compile.runtime.engine import Engine
from fairy_compile.runtime.sampler import Sampler
from fairy_compile.runtime.text import StopFilter, TextStream

FinishReason = Literal["stop", "length", "context", "cancelled"]


class Generation:
    """One answer: an iterator over pieces of its text.

    It ends when it is closed, or when nothing refers to it any more.

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
        if not is_whole(max_tokens) or max_tokens < 1:
            raise FairyError(f"max_tokens is {max_tokens!r}; allowed: 1 or more")
        self._loop = _Loop(
            engine,
            sequence,
            list(prompt),
            sampler,
            text,
            StopFilter(stop),
            max_tokens,
            frozenset(stop_tokens),
            on_end,
            on_feed,
        )
        # It refers to the loop and not to us: an answer that nobody holds any more, as after a
        # `break`, is gone at once, and Python closes the iterator of what is gone.
        self._pieces = self._loop.run()

    @property
    def tokens(self) -> list[int]:
        """Tokens drawn so far, without the one that ended the answer."""
        return self._loop.tokens

    @property
    def text(self) -> str:
        """Text given out so far."""
        return self._loop.text

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while running; see the class."""
        return self._loop.finish_reason

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer here; what was given out stays valid."""
        self._pieces.close()
        self._loop.finish_reason = self._loop.finish_reason or "cancelled"

    def read(self) -> str:
        """Run to the end and return the whole text."""
        for _ in self:
            pass
        return self.text


@dataclass
class _Loop:
    """The work of a `Generation`; attributes are its arguments and attributes."""

    engine: Engine
    start: Callable[[], int]
    prompt: list[int]
    sampler: Sampler
    stream: TextStream
    filter: StopFilter
    max_tokens: int
    stop_tokens: frozenset[int]
    on_end: Callable[[int], None]
    on_feed: Callable[[Sequence[int]], None]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None

    def run(self) -> Generator[str, None, None]:
        """Yield the pieces of the text that are not empty."""
        sequence = self.start()
        try:
            logits = self.engine.prefill(sequence, self.prompt)
            self.on_feed(self.prompt)
            for piece in self._answer(sequence, logits):
                if piece:
                    self.text += piece
                    yield piece
        except BaseException:
            self.finish_reason = self.finish_reason or "cancelled"
            raise
        finally:
            self.on_end(sequence)

    def _answer(self, sequence: int, logits: np.ndarray) -> Iterator[str]:
        while True:
            token = self.sampler.sample(logits)
            if token in self.stop_tokens:
                self.finish_reason = "stop"
                break
            self.tokens.append(token)
            yield self.filter.push(self.stream.push(token))
            if self.filter.stopped:
                self.finish_reason = "stop"
                return
            if len(self.tokens) >= self.max_tokens:
                self.finish_reason = "length"
                break
            if self.engine.length(sequence) >= self.engine.context:
                self.finish_reason = "context"
                break
            logits = self.engine.decode([sequence], [token])[0]
            self.on_feed([token])
        yield self.filter.push(self.stream.finish())
        if self.filter.stopped:
            self.finish_reason = "stop"
        yield self.filter.finish()
