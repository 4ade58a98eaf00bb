"""The last comparison: the best candidates of a search beside the default, longer, on every device.

The best of many noisy scores is better than the candidate is. So it is measured again, and it is
taken only if it is faster than the default and, with no number of rows, slower. On this machine
that is done in several processes: all comparisons of one process share where arrays and code lie in
memory, which moves their ratios by some per cent, however often they are repeated there.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from fairy_compile.errors import FairyError
from fairy_compile.tune.builder import BuildRequest
from fairy_compile.tune.measure import Measured
from fairy_compile.tune.session import KEEP, TaskRun
from fairy_compile.tune.slots import MAX_LOSSES, MAX_TRIES, Candidate, Slot
from fairy_compile.tune.space import Point
from fairy_compile.tune.workers import wait

WORTH = 0.99
"""Score from which on a candidate replaces the default."""

NOT_SLOWER = 1.01
"""Largest ratio with any number of rows: beyond it, a candidate is slower there."""


PLACEMENTS = 3
"""Processes that compare, one after the other, where a device is this machine."""


@dataclass(frozen=True)
class Confirmed:
    """The choice for a task.

    Attributes:
        point: the default's, where nothing is faster.
        measured: of the choice on each device, medians over processes; of the default, empty.
    """

    point: Point
    measured: tuple[Measured, ...] = ()

    @property
    def score(self) -> float:
        """Geometric mean over devices; 1 for the default."""
        return _score(self.measured) if self.measured else 1.0


def confirm(run: TaskRun) -> Confirmed:
    """Compare the best candidates of a finished search with the default.

    Raises:
        FairyError: no device is left.
    """
    best = [p for p in run.ranked()[:KEEP] if run.trials[p].score < WORTH]
    points = [p for p in best if p in run.libraries or _rebuild(run, p)]
    found = _in_all_processes(run, {p: run.libraries[p] for p in points})
    fit = {point: [Measured.medians(m) for m in of_devices] for point, of_devices in found.items()}
    fit = {point: measured for point, measured in fit.items() if _score(measured) <= WORTH}
    if not fit:
        return Confirmed(run.default)
    point = min(fit, key=lambda p: (_score(fit[p]), p))
    return Confirmed(point, tuple(fit[point]))


def _not_slower(of_devices: list[Measured]) -> bool:
    return max(r for m in of_devices for r in m.ratios) <= NOT_SLOWER


def _in_all_processes(
    run: TaskRun, libraries: dict[Point, Path]
) -> dict[Point, list[list[Measured]]]:
    """Return, device by device, the measurements of the candidates that are nowhere slower."""
    found: dict[Point, dict[str, list[Measured]]] = {point: {} for point in libraries}
    for number in range(PLACEMENTS):
        here = [slot for slot in run.crew.slots if not slot.remote]
        if not found or (number and not here):
            break  # devices elsewhere are asked once: sending weights again takes long
        for slot in here if number else []:
            slot.worker.restart()
        measured = _measure(run, {p: libraries[p] for p in found})
        found = {
            point: {m.device: [*found[point].get(m.device, []), m] for m in of_devices}
            for point, of_devices in measured.items()
            if _not_slower(of_devices)
        }
    return {point: list(of.values()) for point, of in found.items()}


def _score(measured: list[Measured] | tuple[Measured, ...]) -> float:
    return math.exp(statistics.fmean(math.log(m.score) for m in measured))


def _rebuild(run: TaskRun, point: Point) -> bool:
    """Build a candidate whose library went with an earlier session."""
    builder = run.crew.builders[0]
    request = BuildRequest(run.task, run.space.knobs(point), run.directory)
    builder.submit(request, run.crew.timeout)
    while (reply := builder.poll()) is None:
        wait([builder], 1.0)
    if reply.status != "ok":
        return False
    run.libraries[point] = reply.value.path
    return True


def _measure(run: TaskRun, libraries: dict[Point, Path]) -> dict[Point, list[Measured]]:
    """Measure every candidate on every device that is left; without those that fail somewhere."""
    crew = run.crew
    waiting = {id(slot): list(libraries) for slot in crew.slots}
    found: dict[Point, dict[str, Measured]] = {point: {} for point in libraries}
    tries: dict[tuple[int, Point], int] = {}

    def busy() -> bool:
        return any(waiting[id(s)] or not s.worker.idle for s in crew.slots)

    while busy():
        for slot in crew.slots:
            if slot.worker.idle and waiting[id(slot)]:
                point = waiting[id(slot)].pop(0)
                candidate = Candidate(point, libraries[point])
                run.measure(slot, candidate, libraries[point], crew.confirm_effort)
        wait(crew.workers, 1.0)
        for slot in list(crew.slots):
            reply = slot.worker.poll()
            if reply is None or slot.item is None:
                continue
            point, slot.item = slot.item.point, None
            verdict = slot.verdict(reply)
            if verdict.kind == "refused":
                raise FairyError(verdict.reason)
            if verdict.measured is not None:
                if point in found:
                    found[point][slot.name] = verdict.measured
            elif verdict.kind == "unfit" or slot.losses >= MAX_LOSSES:
                _drop(run, slot, verdict.reason, void=verdict.kind == "unfit", found=found)
            elif verdict.kind == "lost":
                tries[id(slot), point] = tries.get((id(slot), point), 0) + 1
                if tries[id(slot), point] < MAX_TRIES:
                    waiting[id(slot)].append(point)
                else:
                    found.pop(point, None)
            else:  # wrong, or it crashed or hung
                found.pop(point, None)
    return {point: list(of.values()) for point, of in found.items() if of}


def _drop(
    run: TaskRun,
    slot: Slot,
    reason: str,
    *,
    void: bool,
    found: dict[Point, dict[str, Measured]],
) -> None:
    if void:
        for of_device in found.values():
            of_device.pop(slot.name, None)
    run.drop(slot, reason, void=void)
