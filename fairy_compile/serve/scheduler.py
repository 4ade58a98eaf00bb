"""`Scheduler`: continuous batching of answers over one engine.

Every step admits waiting requests, runs up to a chunk of prompt tokens, and draws one token for
every answer whose prompt has been run. A long prompt so delays others by one chunk at a time.

An answer reserves the pages it can come to need before it starts, so a running one is never
evicted; sequences that are kept for their prefixes get what is left. Prompts are cut where
`Engine.prefill` cuts them, one sequence a call, so that their logits do not depend on what else
runs.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.runtime.pages import PAGE_SIZE
from fairy_compile.serve.answer import Answer
from fairy_compile.serve.request import Failed, Finished, Request, UnanswerableError

if TYPE_CHECKING:
    from fairy_compile.runtime.model import Model
    from fairy_compile.serve.prefixes import Prefixes

_log = logging.getLogger(__name__)


class Scheduler:
    """Runs requests on a model, first come, first served. Not safe for threads.

    Attributes:
        waiting: requests without a sequence, oldest first.
        running: answers in progress, oldest first.
        decode_rows: most sequences of one decode call.
        reserved_pages: KV pages that running answers can come to need.
        prefixes: sequences kept for reuse, or None.
    """

    def __init__(
        self,
        model: Model,
        decode_rows: int,
        *,
        exact: bool = False,
        prefixes: Prefixes | None = None,
    ):
        """Run requests on ``model``; ``exact`` is that of `Engine.decode`."""
        self.waiting: deque[Request] = deque()
        self.running: list[Answer] = []
        self.decode_rows = decode_rows
        self.reserved_pages = 0
        self.prefixes = prefixes
        self._exact = exact
        self._model = model
        self._engine = model.engine

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its turn."""
        self.waiting.append(request)

    def step(self) -> bool:
        """Do a bounded amount of work; return whether anything is left to do."""
        self._drop_cancelled()
        self._admit()
        self._prefill()
        self._decode()
        return bool(self.running or self.waiting)

    def stop(self, failed: Failed) -> None:
        """Fail everything that runs or waits."""
        for request in self.waiting:
            request.notify(failed)
        self.waiting.clear()
        self._fail(list(self.running), failed)
        if self.prefixes:
            self.prefixes.clear()

    def _drop_cancelled(self) -> None:
        for request in [r for r in self.waiting if r.cancelled]:
            self.waiting.remove(request)
            request.notify(Finished("cancelled", len(request.prompt), 0))
        for answer in [a for a in self.running if a.request.cancelled]:
            answer.cancel()
            self._release(answer)

    def _pages(self, request: Request) -> int:
        """Return the KV pages ``request`` can come to need."""
        tokens = min(len(request.prompt) + request.max_tokens, self._engine.context)
        return -(-tokens // PAGE_SIZE)

    def _admit(self) -> None:
        cache = self._engine.cache
        while self.waiting and len(self.running) < cache.max_sequences:
            request = self.waiting[0]
            pages = self._pages(request)
            if self.reserved_pages + pages > cache.pages - 1:  # the cache keeps one page free
                return
            self.waiting.popleft()
            self._start(request, pages)

    def _start(self, request: Request, pages: int) -> None:
        sequence, cached = self._sequence_for(request, pages)
        try:
            answer = Answer(
                request,
                sequence,
                self._model.tokenizer,
                self._model.stop_tokens,
                self._engine.context,
            )
        except Exception as error:
            self._engine.remove_sequence(sequence)
            request.notify(_failed(error))
            return
        answer.position = answer.cached_tokens = cached
        self.reserved_pages += pages
        self.running.append(answer)

    def _sequence_for(self, request: Request, pages: int) -> tuple[int, int]:
        """Return a sequence and how many tokens of the prompt it has already."""
        cache = self._engine.cache
        if self.prefixes is None:
            return self._engine.add_sequence(), 0

        def fits(kept: int, kept_pages: int) -> bool:
            return (
                len(self.running) + kept < cache.max_sequences
                and self.reserved_pages + pages + kept_pages < cache.pages
            )

        running = {a.sequence: a.tokens[: self._engine.length(a.sequence)] for a in self.running}
        return self.prefixes.begin(request.prompt, running, fits)

    def _prefill(self) -> None:
        left = chunk = self._engine.chunk
        for answer in [a for a in self.running if not a.prefilled]:
            while not answer.prefilled and left > 0:
                part = answer.request.prompt[answer.position : answer.position + chunk]
                left -= len(part)
                try:
                    logits = self._engine.prefill(answer.sequence, part)
                except Exception as error:
                    self._fail([answer], _failed(error))
                    break
                answer.position += len(part)
                if answer.prefilled:
                    self._advance([answer], logits[None])

    def _decode(self) -> None:
        ready = [a for a in self.running if a.prefilled]
        for start in range(0, len(ready), self.decode_rows):
            group = ready[start : start + self.decode_rows]
            try:
                logits = self._engine.decode(
                    [a.sequence for a in group],
                    [a.last_token for a in group],
                    exact=self._exact,
                )
            except Exception as error:
                self._fail(group, _failed(error))
                continue
            self._advance(group, logits)

    def _advance(self, answers: Iterable[Answer], rows: np.ndarray) -> None:
        for answer, logits in zip(answers, rows, strict=True):
            try:
                answer.advance(logits)
            except Exception as error:
                self._fail([answer], _failed(error))
                continue
            if answer.finish_reason is not None:
                self._release(answer)

    def _fail(self, answers: Iterable[Answer], failed: Failed) -> None:
        for answer in answers:
            answer.request.notify(failed)
            self._release(answer, keep=False)

    def _release(self, answer: Answer, keep: bool = True) -> None:
        self.running.remove(answer)
        self.reserved_pages -= self._pages(answer.request)
        if self.prefixes is None or not keep:
            self._engine.remove_sequence(answer.sequence)
            return
        run = answer.tokens[: self._engine.length(answer.sequence)]
        self.prefixes.keep(answer.sequence, run, len(answer.request.prompt))


def _failed(error: Exception) -> Failed:
    """Return what the client may know of ``error``; a bug goes to the log."""
    if isinstance(error, FairyError):
        return Failed(str(error), 400 if isinstance(error, UnanswerableError) else 500)
    _log.error("an answer failed", exc_info=error)
    return Failed("the server failed in a way it should not; its log says more")
