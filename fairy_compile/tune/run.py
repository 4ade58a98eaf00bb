"""`Run`: a model's tasks one after the other, and records of what was found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fairy_compile.compiler.schedules import Schedules
from fairy_compile.targets import Target
from fairy_compile.tune.confirm import Confirmed, confirm
from fairy_compile.tune.crew import Crew
from fairy_compile.tune.measure import ReadRequest
from fairy_compile.tune.records import Record, write_records
from fairy_compile.tune.search import ModelSearch, RandomSearch, Search
from fairy_compile.tune.session import TaskRun
from fairy_compile.tune.settings import Settings
from fairy_compile.tune.space import Space
from fairy_compile.tune.tasks import Task
from fairy_compile.tune.trials import Journal
from fairy_compile.tune.versions import versions_text
from fairy_compile.tune.workers import wait

JOURNAL = "trials.jsonl"
_LIBRARIES = "work"
_TRANSFERRED = 3  # best knobs of earlier tasks that a search begins with


@dataclass
class Status:
    """Where a run stands; given to its watcher.

    Attributes:
        tasks: all of them, in order.
        run: the search under way, None before and between.
        finished: task id -> record.
        trials: counted, of all tasks.
        limit: of trials.
        seconds: of all sessions together.
        devices: names of those that measure.
        dropped: device -> why.
    """

    tasks: list[Task]
    limit: int
    run: TaskRun | None = None
    finished: dict[str, Record] = field(default_factory=dict)
    trials: int = 0
    seconds: float = 0.0
    devices: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


Watch = Callable[[Status], None]


class Run:
    """The tasks of one run; call it.

    Args:
        tasks: in order.
        target: compiled for.
        settings: budgets.
        crew: the processes.
        journal: of trials; an unfinished run's is gone on with.
        work: directory for libraries.
        schedule: file for records; it is written after each task.
        watch: called with the `Status`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        target: Target,
        settings: Settings,
        crew: Crew,
        journal: Journal,
        work: Path,
        schedule: Path,
        watch: Watch | None = None,
    ) -> None:
        self.tasks, self.target, self.settings = list(tasks), target, settings
        self.crew, self.journal, self.work, self.schedule = crew, journal, work, schedule
        self.status = Status(self.tasks, settings.trials)
        self._watch = watch
        self._started = time.monotonic()
        self._before = journal.seconds
        self._schedules = Schedules(target)
        self._left: set[str] = set()

    def __call__(self) -> list[Record]:
        """Search the tasks that are not finished; returns the records of those that are, in order.

        Where the budget is spent before a task had a trial, it is left: a record would say that
        nothing is faster than the defaults, and take the place of one that was measured.

        Raises:
            FairyError: see `tune`.
        """
        if self.crew.exclusive and not self.journal.read_bytes_per_second:
            self._read_bandwidth()
        while (task := self._next()) is not None:
            run = self._search(task)
            if run.cut_off and not run.trials:
                self._left.add(task.id)
                continue
            choice = confirm(run)
            self._finish(run, choice)
        finished = self.journal.finished
        records = tuple(
            Record.from_table(finished[t.id], "trials") for t in self.tasks if t.id in finished
        )
        if records:
            write_records(self.schedule, records)
        return records

    def _read_bandwidth(self) -> None:
        worker = self.crew.slots[0].worker
        worker.submit(ReadRequest(), self.crew.timeout)
        while (reply := worker.poll()) is None:
            wait([worker], 1.0)
        if reply.status == "ok":
            self.journal.note_bandwidth(reply.value)

    def clock(self) -> float:
        """Return seconds of all sessions of the run."""
        return self._before + time.monotonic() - self._started

    def _next(self) -> Task | None:
        # Looked up anew each time: a liar takes what it measured with it.
        done = {*self.journal.finished, *self._left}
        return next((t for t in self.tasks if t.id not in done), None)

    def _search(self, task: Task) -> TaskRun:
        left = [t for t in self.tasks if t.id not in self.journal.finished]
        ids = {t.id for t in left}
        spent = sum(t.counts for t in self.journal.trials if t.task not in ids)
        # What a task leaves of its share, the others get.
        share = -(-max(0, self.settings.trials - spent) // len(left))
        deadline = None
        if self.settings.minutes is not None:
            remaining = max(0.0, 60 * self.settings.minutes - self.clock())
            deadline = time.monotonic() + remaining / len(left)
        run = TaskRun(
            task,
            self.crew,
            self.journal,
            self._strategy(task),
            self.work,
            patience=self.settings.patience,
            clock=self.clock,
            watch=self._tell,
        )
        self.status.run = run
        run.run(share, deadline)
        return run

    def _strategy(self, task: Task) -> Search:
        space = Space.of(task)
        if self.settings.search == "random":
            return RandomSearch(space, self.settings.seed)
        scheduled = self._schedules.choose(task.kernel, task.spec, task.batch, task.demands)
        known = [space.point(scheduled.values), *self._of_siblings(task, space)]
        first = [p for p in known if p is not None and any(p)]
        return ModelSearch(space, self.settings.seed, first)

    def _of_siblings(self, task: Task, space: Space) -> list[Any]:
        """Return the points of the best knobs of the same kernel with other shapes."""
        others = [
            self.journal.finished[t.id]
            for t in self.tasks
            if t.id in self.journal.finished
            and (t.kernel_name, t.batch) == (task.kernel_name, task.batch)
        ]
        return [space.point(record["values"]) for record in others[-_TRANSFERRED:]]

    def _finish(self, run: TaskRun, choice: Confirmed) -> None:
        record = self._record(run, choice)
        table = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(record).items()}
        self.journal.finish(run.task.id, table, round(self.clock(), 2))
        write_records(self.schedule, [record])
        for library in run.libraries.values():
            library.unlink(missing_ok=True)
        self.status.run = None
        self._tell()

    def _record(self, run: TaskRun, choice: Confirmed) -> Record:
        task = run.task
        measured = choice.measured
        if measured:
            columns = zip(*(m.seconds for m in measured), strict=True)
            defaults = zip(*(m.default_seconds for m in measured), strict=True)
            median = [statistics.fmean(c) for c in columns]
            default = [statistics.fmean(c) for c in defaults]
            spread = max(m.spread for m in measured)
        else:
            default = median = self._default_seconds(run)
            spread = run.noise
        devices = {s.device for s in self.crew.slots if s.device}
        name = self.settings.key or next(iter(sorted(devices)), "")
        return Record(
            task=task.text,
            kernel=task.kernel_name,
            batch=task.batch,
            values=run.space.changed(run.space.knobs(choice.point)),
            rows=task.rows,
            median_us=tuple(round(1e6 * s, 1) for s in median),
            default_us=tuple(round(1e6 * s, 1) for s in default),
            gain=round(1 / choice.score, 3),
            spread=round(spread, 4),
            device=name,
            date=datetime.now(timezone.utc).date().isoformat(),
            versions=versions_text(),
            demands=dict(task.demands),
        )

    def _default_seconds(self, run: TaskRun) -> list[float]:
        """Return the default's medians over all trials of a task, one for each of its rows."""
        times = [t.default_seconds for t in run.trials.values() if t.default_seconds]
        return [statistics.median(c) for c in zip(*times, strict=True)] or [0.0] * len(
            run.task.rows
        )

    def _tell(self) -> None:
        if self._watch is None:
            return
        status = self.status
        status.trials = sum(t.counts for t in self.journal.trials)
        status.seconds = self.clock()
        status.devices = [slot.name for slot in self.crew.slots]
        status.dropped = dict(self.journal.dropped)
        status.finished = {
            id_: Record.from_table(table, "trials") for id_, table in self.journal.finished.items()
        }
        self._watch(status)
