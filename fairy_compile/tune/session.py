"""The search of one task: candidates are built, checked and timed until a budget is spent.

One thread does it all: it waits for worker processes, takes what they answer, and gives them more.
Where candidates are timed on the machine that builds them, it does one or the other, so that
building does not disturb timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fairy_compile.errors import FairyError
from fairy_compile.tune.builder import BuildRequest, Built
from fairy_compile.tune.crew import Crew
from fairy_compile.tune.measure import Effort, MeasureRequest
from fairy_compile.tune.search import FAILED, Search
from fairy_compile.tune.slots import MAX_LOSSES, MAX_TRIES, Candidate, Slot, Verdict
from fairy_compile.tune.space import Point, Space
from fairy_compile.tune.tasks import Task
from fairy_compile.tune.trials import OK, Journal, Trial
from fairy_compile.tune.workers import Reply, wait

KEEP = 3
"""Libraries of the best candidates that are kept for `confirm`."""

_PROBE = Effort(0.1, 5, 15)
_ALL_KNOWN = 48  # duplicates in a row, after which no other binary is expected
_BETTER = 0.995  # an improvement that patience counts


class TaskRun:
    """The search of one task.

    Args:
        task: what to tune.
        crew: the processes.
        journal: where trials are noted; those it has of this task are taken in.
        search: the strategy.
        directory: for libraries.
        patience: see `Settings`.
        clock: seconds since the start of the run.
        watch: called whenever something happened.

    Attributes:
        trials: of this task, duplicates included.
        best: score of the best so far, 1 for the default.
        noise: half the interquartile range of the default's ratio to itself.
        cut_off: whether the budget ended it, rather than patience or a lack of other candidates.
    """

    def __init__(
        self,
        task: Task,
        crew: Crew,
        journal: Journal,
        search: Search,
        directory: Path,
        *,
        patience: int,
        clock: Callable[[], float],
        watch: Callable[[], None],
    ) -> None:
        self.task, self.space, self.search = task, Space.of(task), search
        self.crew, self.directory = crew, directory
        self.noise = 0.0
        self.cut_off = False
        self._journal, self._patience, self._clock, self._watch = journal, patience, clock, watch
        self.default: Point = (0,) * len(self.space.names)
        self.trials: dict[Point, Trial] = {}
        self._digests: dict[str, Point] = {}
        self._aliases: dict[Point, list[Candidate]] = {}
        self.libraries: dict[Point, Path] = {}
        self._to_build: list[Candidate] = []
        self._building: dict[int, Candidate] = {}
        self._built: list[Candidate] = []

    @property
    def counted(self) -> int:
        """Trials that were paid from the budget."""
        return sum(t.counts for t in self.trials.values())

    @property
    def best(self) -> float:
        """The best score, 1 for the default."""
        return min((t.score for t in self.trials.values() if t.status == OK), default=1.0)

    def run(self, limit: int, deadline: float | None) -> None:
        """Search until ``limit`` trials, the deadline (`time.monotonic`), patience or all points.

        Raises:
            FairyError: the default cannot be built, or no device is left.
        """
        self._build_default()
        for trial in self._journal.trials:
            if trial.task == self.task.id:
                self._take_in(trial)
        while True:
            self._fill(limit, deadline)
            self._dispatch()
            if not self._outstanding:
                return
            wait(self.crew.workers, 1.0)
            self._collect()
            self._watch()

    @property
    def _outstanding(self) -> int:
        measuring = sum(not slot.worker.idle for slot in self.crew.slots)
        return len(self._to_build) + len(self._building) + len(self._built) + measuring

    def _fill(self, limit: int, deadline: float | None) -> None:
        outstanding = self._outstanding
        if self.crew.exclusive and outstanding:
            return  # a batch is built as a whole, then measured
        late = deadline is not None and time.monotonic() > deadline
        left = limit - self.counted - outstanding
        self.cut_off = late or left <= 0
        room = min(self.crew.depth - outstanding, left)
        if late or room <= 0 or self._exhausted_patience():
            return
        self._to_build += [Candidate(point) for point in self.search.ask(room)]

    def _exhausted_patience(self) -> bool:
        recent = list(self.trials.values())[-_ALL_KNOWN:]
        if len(recent) == _ALL_KNOWN and not any(t.counts for t in recent):
            return True  # what is left are more settings of knobs that make no difference
        if not self._patience:
            return False
        best, since = 1.0, 0
        for trial in self.trials.values():
            if trial.status == OK and trial.score < best * _BETTER:
                best, since = trial.score, 0
            else:
                since += trial.counts
        return since >= self._patience

    # ------------------------------------------------------------------ building

    def _build_default(self) -> None:
        """Build the task's default knobs, which all candidates are compared with."""
        builder = self.crew.builders[0]
        known = frozenset[str]()
        builder.submit(
            BuildRequest(self.task, self.space.knobs(self.default), self.directory, known),
            self.crew.timeout,
        )
        while (reply := builder.poll()) is None:
            wait([builder], 1.0)
            self._watch()
        if reply.status != "ok":
            raise FairyError(f"the default of {self.task.key} does not build: {reply.value}")
        built: Built = reply.value
        assert built.path is not None
        self.libraries[self.default] = built.path
        self._digests |= dict.fromkeys(built.digests, self.default)
        self.search.tell(self.default, 1.0)

    def _dispatch(self) -> None:
        measuring = any(not slot.worker.idle for slot in self.crew.slots)
        for number, builder in enumerate(self.crew.builders):
            if not self._to_build or (self.crew.exclusive and measuring):
                break
            if builder.idle:
                candidate = self._to_build.pop(0)
                knobs = self.space.knobs(candidate.point)
                known = frozenset(self._digests)
                request = BuildRequest(self.task, knobs, self.directory, known)
                builder.submit(request, self.crew.timeout)
                self._building[number] = candidate
        if self.crew.exclusive and (self._building or self._to_build):
            return
        for candidate in list(self._built):
            if candidate.wrong and all(s.device in candidate.wrong for s in self.crew.slots):
                self._built.remove(candidate)  # who was to give a second opinion is gone
                reason = next(iter(candidate.wrong.values()))
                self._record(candidate, "wrong", FAILED, reason=reason)
        for slot in sorted(self.crew.slots, key=lambda s: s.served):
            if slot.worker.idle and self._built:
                self._give(slot)

    def _give(self, slot: Slot) -> None:
        if slot.probed != self.task.id:
            self.measure(slot, None, self.libraries[self.default], _PROBE)
            return
        for candidate in self._built:
            if slot.device not in candidate.wrong:
                self._built.remove(candidate)
                self.measure(slot, candidate, candidate.path, self.crew.effort)
                return

    def measure(
        self, slot: Slot, candidate: Candidate | None, library: Path, effort: Effort
    ) -> None:
        """Have a slot measure a library; None stands for the default itself."""
        slot.item = candidate
        slot.served += 1
        baseline, banned = self.libraries[self.default], frozenset(self.crew.banned)
        request = MeasureRequest(
            self.task, library, baseline, effort, self.crew.stream_bytes, banned
        )
        slot.worker.submit(request, self.crew.measure_timeout(slot))

    # ------------------------------------------------------------------ results

    def _collect(self) -> None:
        for number, builder in enumerate(self.crew.builders):
            reply = builder.poll()
            if reply is not None:
                self._take_built(self._building.pop(number), reply)
        for slot in list(self.crew.slots):
            reply = slot.worker.poll()
            if reply is not None and slot in self.crew.slots:
                item, slot.item = slot.item, None
                self._judge(slot, item, slot.verdict(reply))

    def _take_built(self, candidate: Candidate, reply: Reply) -> None:
        if reply.status == "refused":
            raise FairyError(reply.value)
        if reply.status != "ok":
            status = "timeout" if reply.status == "timeout" else "build"
            self._record(candidate, status, FAILED, reason=reply.value)
            return
        built: Built = reply.value
        candidate.path, candidate.digests = built.path, built.digests
        # Another worker may have built its equal in the meantime.
        twins = [d for d in built.digests if d in self._digests]
        if not twins:
            self._digests |= dict.fromkeys(built.digests, candidate.point)
            self._built.append(candidate)
            return
        if built.path is not None:
            built.path.unlink(missing_ok=True)
        original = self._digests[twins[0]]
        self._digests |= dict.fromkeys(built.digests, original)
        known = self._score_of(original)
        if known is None:
            self._aliases.setdefault(original, []).append(candidate)
        else:
            self._record(candidate, "duplicate", known)

    def _score_of(self, point: Point) -> float | None:
        if point == self.default:
            return 1.0
        return self.trials[point].score if point in self.trials else None

    def _judge(self, slot: Slot, item: Candidate | None, verdict: Verdict) -> None:
        if verdict.kind == "refused":
            raise FairyError(verdict.reason)
        if verdict.kind in ("unfit", "lost"):
            if item is not None:
                item.lost += verdict.blamed
                if item.lost >= MAX_TRIES:
                    self._record(item, "crash", FAILED, reason=verdict.reason)
                else:
                    self._built.insert(0, item)
            if verdict.kind == "unfit" or slot.losses >= MAX_LOSSES:
                self.drop(slot, verdict.reason, void=verdict.kind == "unfit")
        elif item is None:
            self._judge_probe(slot, verdict)
        elif verdict.kind == "wrong":
            item.wrong[slot.device] = verdict.reason
            if any(other.device not in item.wrong for other in self.crew.slots):
                self._built.insert(0, item)  # for a second opinion
            else:
                self._record(item, "wrong", FAILED, slot=slot, reason=verdict.reason)
        else:
            # Where one device computes right what another did not, the other cannot be trusted.
            for liar in [s for s in self.crew.slots if s.device in item.wrong]:
                self.drop(liar, item.wrong[liar.device], void=True)
            self._record(item, verdict.kind, verdict.score, slot, verdict.reason, verdict)

    def _judge_probe(self, slot: Slot, verdict: Verdict) -> None:
        if verdict.measured is not None:
            slot.probed = self.task.id
            self.noise = max(self.noise, verdict.measured.spread)
            return
        slot.losses += 1
        if slot.losses >= MAX_TRIES:
            self.drop(
                slot,
                f"the default knobs end in a {verdict.kind} there ({verdict.reason}); is it the "
                "target that was asked for?",
                void=False,
            )

    def drop(self, slot: Slot, reason: str, *, void: bool) -> None:
        """Work on without a device; with ``void``, nothing that it measured counts any more.

        Raises:
            FairyError: it was the last one.
        """
        if slot.item is not None:
            self._built.insert(0, slot.item)
            slot.item = None
        gone = self._journal.drop(slot.name, reason, void=void)
        for point in [p for p, t in self.trials.items() if t in gone]:
            del self.trials[point]
            self.search.forget(point)
            self._digests = {d: p for d, p in self._digests.items() if p != point}
        self.crew.drop(slot, reason)

    def _record(
        self,
        candidate: Candidate,
        status: str,
        score: float,
        slot: Slot | None = None,
        reason: str = "",
        verdict: Verdict | None = None,
    ) -> None:
        measured = verdict.measured if verdict else None
        trial = Trial(
            task=self.task.id,
            knobs=self.space.knobs(candidate.point),
            status=status,
            score=round(score, 5),
            seconds=measured.seconds if measured else (),
            default_seconds=measured.default_seconds if measured else (),
            ratios=measured.ratios if measured else (),
            spreads=measured.spreads if measured else (),
            device=slot.name if slot else "",
            reason=reason,
            digests=candidate.digests,
            at=round(self._clock(), 2),
        )
        self._journal.add(trial)
        if candidate.path is not None:
            self.libraries[candidate.point] = candidate.path
        self._take_in(trial)

    def _take_in(self, trial: Trial) -> None:
        """Learn from a trial, of now or of an earlier session."""
        point = self.space.point(trial.knobs)
        if point is None:
            return  # of a version with other values
        self.trials[point] = trial
        self.search.tell(point, trial.score)
        if trial.counts:
            self._digests |= {d: point for d in trial.digests if d not in self._digests}
        for candidate in self._aliases.pop(point, []):
            self._record(candidate, "duplicate", trial.score)
        best = {*self.ranked()[:KEEP], self.default}
        for loser in [p for p in self.libraries if p not in best]:
            self.libraries.pop(loser).unlink(missing_ok=True)

    def ranked(self) -> list[Point]:
        """Return the points that were measured, best first, one of each binary."""
        measured = [p for p, t in self.trials.items() if t.status == OK]
        return sorted(measured, key=lambda p: (self.trials[p].score, p))
