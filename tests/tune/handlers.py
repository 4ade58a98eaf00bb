"""What workers of the tests serve; without TVM, so that they start at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fairy_compile.errors import FairyError


def make(mode="fine"):
    if mode == "unfit":
        raise FairyError("there is no such CPU here")
    if mode == "dead":
        os._exit(3)
    return handle


def handle(request):
    kind, value = request
    if kind == "double":
        return 2 * value
    if kind == "signal":
        print("about to end", flush=True)
        os.kill(os.getpid(), value)
    if kind == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Path(value).write_text(str(os.getpid()))
        while True:
            time.sleep(60)
    if kind == "raise":
        raise ValueError(value)
    if kind == "refuse":
        raise FairyError(value)
    return os.getpid()


def parent(directory: str) -> None:
    """A process with a worker that hangs: run it, kill it, and see whether the worker goes."""
    from fairy_compile.tune.workers import Worker, wait

    worker = Worker("orphan", make, (), Path(directory))
    worker.submit(("hang", str(Path(directory) / "pid")), 600)
    while worker.poll() is None:
        wait([worker], 1)


if __name__ == "__main__":
    parent(sys.argv[1])


def spawn_parent(directory: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "tests.tune.handlers", str(directory)])
