"""`Exchange`: the answers to one HTTP request, between the event loop and the engine thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fairy_compile.serve.metrics import AnswerTimer, Metrics
from fairy_compile.serve.request import Event, Failed, Finished, Piece, Request
from fairy_compile.serve.worker import EngineThread


@dataclass
class Usage:
    """Tokens of all answers to a request; the prompt of several choices counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_json(self) -> dict[str, object]:
        """Return OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Exchange:
    """Runs requests and hands out their events as they come.

    Attributes:
        requests: one a choice; see `add`.
        choices: choices a prompt, which come one after the other.
        stream: hand out pieces as they come; else all when their answer has ended.
        usage: complete when the events have ended.
    """

    engine: EngineThread
    metrics: Metrics
    choices: int = 1
    stream: bool = True
    requests: list[Request] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._left = 0

    def add(self, request: Request) -> None:
        """Add ``request`` as the next choice, its events to be handed out here."""
        index, timer = len(self.requests), AnswerTimer(self.metrics)
        held: list[Event] = []

        def notify(event: Event) -> None:
            timer.see(event)
            held.append(event)
            # Waking the event loop for every token would slow the engine down.
            if self.stream or not isinstance(event, Piece):
                with suppress(RuntimeError):  # the event loop has ended before the engine
                    self._loop.call_soon_threadsafe(self._put, index, tuple(held))
                held.clear()

        request.notify = notify
        self.requests.append(request)

    def _put(self, index: int, events: Sequence[Event]) -> None:
        for event in events:
            self._events.put_nowait((index, event))

    def start(self) -> None:
        """Queue all requests; raises what `EngineThread.submit` raises."""
        self.engine.submit(self.requests)
        self._left = len(self.requests)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (choice, event) until all answers have ended; cancels them when abandoned."""
        try:
            while self._left:
                index, event = await self._events.get()
                if isinstance(event, (Finished, Failed)):
                    self._left -= 1
                if isinstance(event, Finished):
                    self._count(index, event)
                yield index, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End all answers that have not ended."""
        if self._left:
            self.engine.cancel(self.requests)
            self._left = 0

    def _count(self, index: int, event: Finished) -> None:
        self.usage.completion_tokens += event.completion_tokens
        if index % self.choices == 0:
            self.usage.prompt_tokens += event.prompt_tokens
            self.usage.cached_tokens += event.cached_tokens
