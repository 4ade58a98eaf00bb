"""Checking and timing candidates: what a device has to offer, and this machine as one.

A candidate is timed in turns with the task's default knobs, so that a device that warms up, slows
down or is shared moves both. What counts is the median of the ratios of neighbours in time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fairy_compile.tune.problem import Problem, make_problem
from fairy_compile.tune.tasks import Task

STREAM_BYTES = 128 << 20
"""Copies of weights to run through in turn, so that they come from memory as in a model."""

_SAMPLE_SECONDS = 0.004
_HOPELESS = 1.6  # times slower than the default after a few rounds: no need to know better


@dataclass(frozen=True)
class Effort:
    """How long to time a candidate with each number of rows.

    Attributes:
        seconds: of samples to aim at, baseline included.
        least, most: rounds, each a sample of the default and one of the candidate.
    """

    seconds: float
    least: int
    most: int


SEARCH = Effort(0.15, 5, 25)
CONFIRM = Effort(1.0, 15, 101)


@dataclass(frozen=True)
class MeasureRequest:
    """What to measure.

    Attributes:
        task: the function.
        library: of the candidate.
        baseline: of the default knobs.
        effort: how long.
        stream_bytes: bytes of weights to run through in turn, at most; of a small model its own.
        banned: devices that must not serve it.
    """

    task: Task
    library: Path
    baseline: Path
    effort: Effort = SEARCH
    stream_bytes: int = STREAM_BYTES
    banned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Measured:
    """Times of a correct candidate, one entry for each of the task's rows.

    Attributes:
        seconds: medians of a call.
        default_seconds: of the default knobs, in turns with it.
        ratios: medians of seconds / default_seconds of neighbours in time.
        spreads: half the interquartile range of those ratios.
        device: what it ran on.
    """

    seconds: tuple[float, ...]
    default_seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    spreads: tuple[float, ...]
    device: str

    @property
    def score(self) -> float:
        """Geometric mean of the ratios: below 1 is faster than the default."""
        return math.exp(statistics.fmean(map(math.log, self.ratios)))

    @property
    def spread(self) -> float:
        """The largest of the spreads."""
        return max(self.spreads)

    @staticmethod
    def medians(several: Sequence[Measured]) -> Measured:
        """Return medians of one candidate's measurements on one device.

        Spreads are the largest, or half of what the ratios of the measurements differ by.
        """

        def column(name: str) -> list[tuple[float, ...]]:
            return list(zip(*(getattr(m, name) for m in several), strict=True))

        ratios, spreads = column("ratios"), column("spreads")
        return Measured(
            seconds=tuple(map(statistics.median, column("seconds"))),
            default_seconds=tuple(map(statistics.median, column("default_seconds"))),
            ratios=tuple(map(statistics.median, ratios)),
            spreads=tuple(
                max(*within, (max(of) - min(of)) / 2)
                for of, within in zip(ratios, spreads, strict=True)
            ),
            device=several[0].device,
        )


@dataclass(frozen=True)
class Wrong:
    """The candidate's numbers are wrong, and the device computes the default right."""

    reason: str
    device: str


@dataclass(frozen=True)
class Unfit:
    """The device cannot be trusted: wrong numbers of the default, or impossible times."""

    reason: str
    device: str


@dataclass(frozen=True)
class Lost:
    """The device did not answer; the candidate may have brought it down if it had ``begun``."""

    reason: str
    device: str
    begun: bool = False


@dataclass(frozen=True)
class ReadRequest:
    """Ask for the rate of plain reads of memory, in bytes a second; 0 where it is not known."""


Outcome = Measured | Wrong | Unfit | Lost


class DeviceLost(Exception):
    """The device went away, or there is none."""


class Device(Protocol):
    """Runs functions of one task at a time.

    Attributes:
        name: what tells it from others.
        fastest_bytes: bytes of weights that no such device reads in a second.
    """

    name: str
    fastest_bytes: float

    def connect(self, banned: frozenset[str]) -> bool:
        """Get ready; returns whether what was prepared or loaded before is gone.

        Raises:
            DeviceLost: it cannot be had.
        """

    def prepare(self, task: Task, problem: Problem, stream_bytes: int) -> None:
        """Place a task's inputs on the device."""

    def load(self, library: Path) -> Any:
        """Load a library; the result stands for its function."""

    def output(self, function: Any, rows: int) -> np.ndarray:
        """Call it with so many rows, and return y."""

    def seconds(self, function: Any, rows: int, calls: int) -> float:
        """Call it, and return the mean seconds of a call."""

    def read_bytes_per_second(self) -> float:
        """Return the rate of plain reads of memory; 0 where it is not known."""


class Measurer:
    """Serves `MeasureRequest` on one device; of the factory's arguments makes the device."""

    def __init__(self, make: Callable[..., Device], *arguments: Any) -> None:
        self.device = make(*arguments)
        self._task: str | None = None
        self._problem: Problem | None = None
        self._baselines: dict[Path, Any] = {}

    def __call__(self, request: MeasureRequest | ReadRequest) -> Outcome | float:
        """Check a candidate, then time it; or read memory."""
        device, begun = self.device, False
        if isinstance(request, ReadRequest):
            return device.read_bytes_per_second()
        try:
            if device.connect(request.banned) or self._task != request.task.id:
                self._prepare(request)
            baseline = self._baselines.get(request.baseline)
            if baseline is None:
                baseline = device.load(request.baseline)
                reason = self._error(request.task, baseline)
                if reason:
                    return Unfit(f"wrong numbers of the default knobs: {reason}", device.name)
                self._baselines[request.baseline] = baseline
            begun = request.library != request.baseline
            candidate = device.load(request.library)
            reason = self._error(request.task, candidate)
            if reason:
                # The default was right before: a device that gets it wrong now cannot be trusted.
                again = self._error(request.task, baseline) if begun else reason
                if again:
                    return Unfit(f"wrong numbers of the default knobs: {again}", device.name)
                return Wrong(reason, device.name)
            return self._compare(request, baseline, candidate)
        except DeviceLost as error:
            self._task = None
            return Lost(str(error), device.name, begun)

    def _prepare(self, request: MeasureRequest) -> None:
        self._baselines.clear()
        if self._task != request.task.id or self._problem is None:
            self._task = None
            self._problem = make_problem(request.task)
        self.device.prepare(request.task, self._problem, request.stream_bytes)
        self._task = request.task.id

    def _error(self, task: Task, function: Any) -> str | None:
        assert self._problem is not None
        for rows in task.rows:
            reason = self._problem.error(rows, self.device.output(function, rows))
            if reason:
                return reason
        return None

    def _compare(self, request: MeasureRequest, baseline: Any, candidate: Any) -> Outcome:
        found = [
            compare(self.device, baseline, candidate, rows, request.effort)
            for rows in request.task.rows
        ]
        fastest = min(min(pair) for samples in found for pair in samples)
        floor = request.task.weight_bytes / self.device.fastest_bytes
        if not fastest > floor:
            return Unfit(
                f"it claims {fastest * 1e6:.3g} us for a call that reads "
                f"{request.task.weight_bytes} bytes",
                self.device.name,
            )
        ratios = [sorted(ours / theirs for theirs, ours in samples) for samples in found]
        return Measured(
            seconds=tuple(statistics.median(ours for _, ours in samples) for samples in found),
            default_seconds=tuple(statistics.median(d for d, _ in samples) for samples in found),
            ratios=tuple(map(statistics.median, ratios)),
            spreads=tuple(map(_half_quartiles, ratios)),
            device=self.device.name,
        )


def compare(
    device: Device, baseline: Any, candidate: Any, rows: int, effort: Effort
) -> list[tuple[float, float]]:
    """Time two functions in turns; returns (seconds of the baseline, of the candidate) pairs."""
    device.seconds(candidate, rows, 1)
    once = max(device.seconds(baseline, rows, 1), 1e-7)
    calls = max(1, min(1000, round(_SAMPLE_SECONDS / once)))
    pairs: list[tuple[float, float]] = []
    start = time.monotonic()
    while len(pairs) < effort.most:
        order = (baseline, candidate) if len(pairs) % 2 == 0 else (candidate, baseline)
        taken = {id(f): device.seconds(f, rows, calls) for f in order}
        pairs.append((taken[id(baseline)], taken.get(id(candidate), taken[id(baseline)])))
        if len(pairs) < effort.least:
            if len(pairs) >= 3 and all(ours > _HOPELESS * theirs for theirs, ours in pairs):
                break
        elif time.monotonic() - start >= effort.seconds:
            break
    return pairs


def _half_quartiles(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
