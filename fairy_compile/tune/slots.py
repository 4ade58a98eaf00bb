"""Device slots: the worker processes that measure, and how far each is trusted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairy_compile.tune.measure import Lost, Measured, Unfit, Wrong
from fairy_compile.tune.search import FAILED
from fairy_compile.tune.space import Point
from fairy_compile.tune.workers import Reply, Worker

MAX_LOSSES = 3  # in a row, before a device is given up
MAX_TRIES = 2  # of a candidate that a device was lost with, before it takes the blame


@dataclass
class Candidate:
    """A built point, or one to be built.

    Attributes:
        point: in the task's space.
        path: its library.
        digests: of its binary.
        lost: how often a device was lost with it.
        wrong: device -> what was wrong with its numbers there.
    """

    point: Point
    path: Any = None
    digests: tuple[str, ...] = ()
    lost: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


@dataclass
class Slot:
    """One worker that measures.

    Attributes:
        worker: the process.
        remote: whether it measures elsewhere, so that losing it may not be the candidate's fault.
        item: what it works on; None for a probe of the default knobs.
        probed: task whose default it ran right, and the ratio's spread of that against itself.
        losses: in a row.
        served: requests so far.
        device: the name it gave last.
    """

    worker: Worker
    remote: bool
    item: Candidate | None = None
    probed: str = ""
    losses: int = 0
    served: int = 0
    device: str = ""

    @property
    def name(self) -> str:
        """The device, or the worker where that has not said yet."""
        return self.device or self.worker.name

    def verdict(self, reply: Reply) -> Verdict:
        """Return what a reply says of the candidate and of the device."""
        outcome = reply.value if reply.status == "ok" else None
        if outcome is not None:
            self.device = outcome.device or self.device
        if isinstance(outcome, Measured):
            self.losses = 0
            return Verdict("ok", measured=outcome)
        if isinstance(outcome, Wrong):
            self.losses = 0
            return Verdict("wrong", outcome.reason)
        if isinstance(outcome, Unfit):
            return Verdict("unfit", outcome.reason)
        if isinstance(outcome, Lost):
            self.losses += 1
            return Verdict("lost", outcome.reason, blamed=outcome.begun)
        if reply.status == "refused":
            return Verdict("refused", reply.value)
        if self.remote:  # of an error, a crash or a hang there, any side may be the cause
            self.losses += 1
            return Verdict("lost", reply.value, blamed=True)
        kind = "timeout" if reply.status == "timeout" else "crash"
        return Verdict(kind, reply.value)


@dataclass(frozen=True)
class Verdict:
    """What a measurement came to.

    Attributes:
        kind: ``ok``, ``wrong``, ``crash``, ``timeout``; ``unfit`` and ``lost`` are the device's
            fault, or may be; ``refused`` is a user's mistake.
        reason: in words.
        measured: of ``ok``.
        blamed: of ``lost``, whether the candidate may be to blame.
    """

    kind: str
    reason: str = ""
    measured: Measured | None = None
    blamed: bool = False

    @property
    def score(self) -> float:
        """The score to tell the search."""
        return self.measured.score if self.measured else FAILED
