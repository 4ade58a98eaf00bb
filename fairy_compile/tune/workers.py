"""Worker processes that serve one request at a time and may be lost without loss.

A worker can crash, hang or be killed at any time: the request it served is reported as failed, and
a new process takes its place. It never outlives this process, not even if that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from fairy_compile.errors import FairyError

START_SECONDS = 180.0
"""Until a worker answers: importing TVM takes seconds, on a busy or slow machine many."""

_MAX_STARTS = 3  # in a row without an answer, before giving up


@dataclass(frozen=True)
class Reply:
    """The end of a request.

    Attributes:
        request: what was asked.
        status: ``ok``; ``refused``, a user's mistake; ``error``, an exception; ``timeout``; or
            ``crash``.
        value: of ``ok``, what the handler returned, else what happened, in words.
    """

    request: Any
    status: Literal["ok", "refused", "error", "timeout", "crash"]
    value: Any


class Worker:
    """One process. ``factory(*arguments)`` there returns the function that serves requests.

    Args:
        name: for messages and the log's file name.
        factory: importable function or class.
        arguments: of the factory; pickled.
        log: directory for what the process prints, and for its temporary files.
    """

    def __init__(
        self, name: str, factory: Callable[..., Any], arguments: Sequence[Any], log: Path
    ) -> None:
        self.name = name
        self._factory, self._arguments = factory, tuple(arguments)
        self._log = log / f"{name}.log"
        self._request: Any = None
        self._timeout = 0.0
        self._failed_starts = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._factory, self._arguments, self._log, os.getpid()),
            name=self.name,
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._ready = False
        self._sent = False
        self._deadline = time.monotonic() + START_SECONDS

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        return self._process.pid

    @property
    def idle(self) -> bool:
        """Whether it takes a request; one that is starting does, and serves it later."""
        return self._request is None

    @property
    def deadline(self) -> float | None:
        """When a running request, or the start, is given up; of `time.monotonic`."""
        return self._deadline if self._request is not None else None

    def submit(self, request: Any, timeout: float) -> None:
        """Serve ``request``, not None, within ``timeout`` seconds of its start."""
        if not self.idle:
            raise RuntimeError(f"{self.name} is busy")
        self._request, self._timeout, self._sent = request, timeout, False
        self._send()

    def _send(self) -> None:
        if self._ready and not self._sent and self._request is not None:
            self._sent = True
            self._deadline = time.monotonic() + self._timeout
            with contextlib.suppress(OSError):  # it died idle; `poll` finds the end of the pipe
                self.pipe.send(self._request)

    def poll(self) -> Reply | None:
        """Return the end of the running request, if it has ended; restarts a lost process.

        Raises:
            FairyError: the process cannot be started.
        """
        try:
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "ready":
                    self._ready, self._failed_starts = True, 0
                    self._send()
                elif kind == "unfit":
                    self.close()
                    raise FairyError(value)
                else:
                    return self._end(kind, value)
        except (EOFError, OSError):
            return self._lost("crash", self._describe_exit())
        if self._request is not None and time.monotonic() > self._deadline:
            if self._sent:
                return self._lost("timeout", f"no answer within {self._timeout:g} s")
            return self._lost("crash", f"did not start within {START_SECONDS:g} s")
        return None

    def _end(self, status: Any, value: Any) -> Reply:
        reply = Reply(self._request, status, value)
        self._request = None
        return reply

    def _lost(self, status: Any, words: str) -> Reply | None:
        if not self._ready:
            self._failed_starts += 1
        self.close()
        if self._failed_starts >= _MAX_STARTS:
            raise FairyError(f"{self.name} does not start: {words}")
        resent = self._request is not None and not self._sent
        self._start()
        if resent or self._request is None:
            return None  # nothing was being served; what waits is served by the new process
        return self._end(status, words)

    def _describe_exit(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            try:
                how = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was killed by signal {-code}"
        else:
            how = f"ended with status {code}"
        lines = self._log.read_text("utf-8", "replace").split("\n") if self._log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the process {how}{f': {last[:200]}' if last else ''}"

    def restart(self) -> None:
        """Serve what comes next in a new process."""
        if not self.idle:
            raise RuntimeError(f"{self.name} is busy")
        self.close()
        self._start()

    def close(self) -> None:
        """End the process now."""
        self.pipe.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def wait(workers: Sequence[Worker], seconds: float) -> None:
    """Wait until one of ``workers`` has something to tell, at most until the next deadline."""
    limits = [w.deadline for w in workers if w.deadline is not None]
    if limits:
        seconds = min(seconds, max(0.0, min(limits) - time.monotonic()) + 0.01)
    connection.wait([w.pipe for w in workers], seconds)


def _serve(
    pipe: connection.Connection,
    factory: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path,
    parent: int,
) -> None:
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # Temporary files of a process that is killed go with the run's directory.
    os.environ["TMPDIR"] = tempfile.tempdir = str(log.parent)
    try:
        handler = factory(*arguments)
    except FairyError as error:
        pipe.send(("unfit", str(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            request = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            reply = ("ok", handler(request))
        except FairyError as error:
            reply = ("refused", str(error))
        except Exception as error:
            text = str(error).strip()
            print(text, flush=True)
            reply = ("error", f"{type(error).__name__}: {_last_line(text)}")
        pipe.send(reply)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _end_with(parent: int) -> None:
    """End this process when its parent does, even in the middle of compiled code."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG; the parent's thread that started us counts
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
