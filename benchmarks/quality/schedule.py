"""Which run is next, several side by side, and a stop in time.

Processes that work on one study share its runs through locked files. Within a process runs are
generators that yield how far they are: on CUDA a few of them take turns, each on a stream of its
own, so that the GPU has several small models to work on at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

Going = Generator[float, None, dict]  # yields the share done, returns the figures

_NEVER = float("inf")
_WARM = 0.05  # share of a run after which its speed says something
_SLACK = 1.3  # runs get faster when others end: how far beyond the time left they may look


@dataclass(frozen=True)
class Run:
    """Something to do once.

    Attributes:
        place: directory of its files.
        name: of its files: NAME.json when done, NAME.late when there was no time, NAME.failed.
        facts: put into NAME.json beside what ``go`` returns.
        go: begins it, given the file for its log.
        ready: whether it can begin yet.
    """

    place: Path
    name: str
    facts: dict
    go: Callable[[Path], Going]
    ready: Callable[[], bool] = lambda: True

    def file(self, kind: str) -> Path:
        """Return one of its files."""
        return self.place / f"{self.name}.{kind}"

    @property
    def over(self) -> bool:
        """Whether it is done, failed or given up."""
        return any(self.file(kind).exists() for kind in ("json", "late", "failed"))


def claim(path: Path) -> IO | None:
    """Lock a file, or return None if another holds it; a process that dies lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


@dataclass
class _Lane:
    """A run that is going."""

    run: Run
    lock: IO
    going: Going
    stream: contextlib.AbstractContextManager
    begun: float = field(default_factory=time.monotonic)

    def advance(self, deadline: float) -> bool:
        """Go on for a bit; return whether there is more to come."""
        try:
            with self.stream:
                done = next(self.going)
        except StopIteration as end:
            figures = {**self.run.facts, **end.value}
            figures["seconds"] = round(time.monotonic() - self.begun, 1)
            partial = self.run.file("partial")
            partial.write_text(json.dumps(figures) + "\n")
            partial.replace(self.run.file("json"))
            print(json.dumps(figures), flush=True)
            return self._end()
        except Exception:
            self.run.file("failed").write_text(traceback.format_exc())
            print(f"{self.run.place.name} {self.run.name} failed:", flush=True)
            traceback.print_exc()
            return self._end()
        now = time.monotonic()
        if done >= _WARM and (1 - done) / done * (now - self.begun) > _SLACK * (deadline - now):
            self.stop(f"{100 * done:.0f} % done with {deadline - now:.0f} seconds left")
            return False
        return True

    def stop(self, why: str) -> None:
        """Give up."""
        self.going.close()
        self.run.file("late").write_text(why + "\n")
        print(f"{self.run.place.name} {self.run.name} given up: {why}", flush=True)
        self._end()

    def _end(self) -> bool:
        self.lock.close()
        return False


def work_through(
    runs: Iterable[Run], *, lanes: int = 1, cuda: bool = False, deadline: float = _NEVER
) -> bool:
    """Do every run that no other process has done or is doing, in their order.

    Args:
        runs: what is worth most first; asked again before every choice.
        lanes: how many may go side by side.
        cuda: give every one a CUDA stream.
        deadline: of `time.monotonic`; what is not done by then is given up, and so is early on
            what will not be.

    Returns:
        Whether none failed in this process.
    """
    runs, active = list(runs), []
    free = [torch.cuda.Stream() if cuda else None for _ in range(lanes)]
    fine = True
    while True:
        waiting = False
        for run in runs:
            if not free or time.monotonic() > deadline:
                waiting = True  # not all were looked at
                break
            if run.over:
                continue
            if not run.ready():
                waiting = True
                continue
            lock = claim(run.file("lock"))
            if lock is None:
                waiting = True
                continue
            if run.over:
                lock.close()
                continue
            run.file("log").unlink(missing_ok=True)
            stream = free.pop()
            context = torch.cuda.stream(stream) if cuda else contextlib.nullcontext()
            lane = _Lane(run, lock, run.go(run.file("log")), context)
            active.append((lane, stream))
        for lane, stream in list(active):
            if time.monotonic() > deadline:
                lane.stop("out of time")
            elif lane.advance(deadline):
                continue
            active.remove((lane, stream))
            free.append(stream)
            fine &= not lane.run.file("failed").exists()
        if not active and (time.monotonic() > deadline or not waiting):
            return fine
        if len(free) == lanes:
            time.sleep(0.2)
