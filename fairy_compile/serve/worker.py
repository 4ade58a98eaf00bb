"""`EngineThread`: the one thread that loads the model and runs it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fairy_compile.serve.invariance import invariant_rows
from fairy_compile.serve.prefixes import Prefixes
from fairy_compile.serve.request import ClosingError, Failed, QueueFullError, Request
from fairy_compile.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from fairy_compile.runtime.model import Model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Load:
    """How busy the engine is: requests with and without a sequence, and KV pages.

    ``kv_pages_used`` hold tokens now; ``kv_pages_reserved`` are those running answers can come to
    need; ``kv_pages_kept`` are of sequences kept for prompts that begin like them.
    """

    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_reserved: int
    kv_pages_kept: int
    kv_pages_total: int


class EngineThread:
    """Owns a model: TVM's thread pool belongs to the thread that made it.

    Attributes:
        model: for tokenizer, template and limits; its engine is the thread's alone.
        decode_rows: most sequences of one decode call.
        load: how busy it is, as of the last step or submission.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        max_queue: int = 64,
        invariant: bool = False,
        reuse: bool = True,
    ):
        """Load a model and start to wait for requests.

        Args:
            load: returns the model; called in the new thread.
            max_queue: most requests that wait while all sequences are taken.
            invariant: split decode calls so that no answer depends on what runs beside it.
            reuse: do not run again what a prompt shares with one before it, see `serve.prefixes`.

        Raises:
            FairyError: what ``load`` raises.
        """
        self.max_queue = max_queue
        self.invariant = invariant
        self.reuse = reuse
        self._open = load
        self._wake = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._outstanding = 0
        self._draining = False
        self._closing = False
        self._dead = False
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return not (self._draining or self._closing or self._dead)

    @property
    def capacity(self) -> int:
        """Most requests that may run and wait together."""
        return self.model.engine.cache.max_sequences + self.max_queue

    @property
    def full(self) -> bool:
        """Whether not one more request would be taken now."""
        return self._outstanding >= self.capacity

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of ``requests`` or none.

        Raises:
            QueueFullError: more would run and wait than are allowed.
            ClosingError: the server is shutting down.
        """
        with self._wake:
            if not self.alive:
                raise ClosingError("the server is shutting down")
            if self._outstanding + len(requests) > self.capacity:
                raise QueueFullError(
                    f"{self._outstanding} requests run or wait; allowed: {self.capacity}; "
                    "try again later"
                )
            self._outstanding += len(requests)
            self.load = replace(self.load, waiting=self.load.waiting + len(requests))
            self._inbox.extend(requests)
            self._wake.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """End ``requests`` at the next step; those that have ended stay as they are."""
        with self._wake:
            for request in requests:
                request.cancelled = True
            self._wake.notify()

    def drain(self) -> None:
        """Take no more requests; those there are go on. Safe in a signal handler."""
        self._draining = True

    def abort(self) -> None:
        """Fail what still runs and free the model, after the step that is running."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self, timeout: float | None = None) -> None:
        """Do as `abort` and wait until it is done."""
        self.abort()
        self._thread.join(timeout)

    def _main(self) -> None:
        try:
            self.model = self._open()
            engine = self.model.engine
            rows = invariant_rows(engine) if self.invariant else engine.cache.max_sequences
            self.decode_rows = rows
            prefixes = Prefixes(engine, exact=self.invariant) if self.reuse else None
            self._scheduler = Scheduler(self.model, rows, exact=self.invariant, prefixes=prefixes)
            self._account()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        failed = Failed("the server is shutting down", 503)
        try:
            while not self._closing:
                self._take()
                self._scheduler.step()
                self._account()
        except BaseException:
            _log.exception("the engine thread failed")
            failed = Failed("the server failed in a way it should not; its log says more")
        finally:
            self._end(failed)

    def _account(self) -> None:
        """Publish how busy the engine is; only this thread may ask the cache."""
        scheduler, cache = self._scheduler, self.model.engine.cache
        with self._wake:
            waiting = len(self._inbox) + len(scheduler.waiting)
            self._outstanding = waiting + len(scheduler.running)
            self.load = Load(
                running=len(scheduler.running),
                waiting=waiting,
                kv_pages_used=cache.used_pages,
                kv_pages_reserved=scheduler.reserved_pages,
                kv_pages_kept=scheduler.prefixes.pages if scheduler.prefixes else 0,
                kv_pages_total=cache.pages - 1,
            )

    def _take(self) -> None:
        """Move requests to the scheduler; sleeps while there is nothing to do."""
        with self._wake:
            busy = self._scheduler.running or self._scheduler.waiting
            while not (busy or self._inbox or self._closing):
                self._wake.wait()
            while self._inbox:
                self._scheduler.add(self._inbox.popleft())

    def _end(self, failed: Failed) -> None:
        with self._wake:
            self._dead = True
            rest, self._inbox = list(self._inbox), deque()
        for request in rest:
            request.notify(failed)
        self._scheduler.stop(failed)
        self._account()
        self.model.close()
