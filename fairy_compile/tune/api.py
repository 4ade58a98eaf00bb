"""`tune`: what the command line and Python users call, and what they get back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fairy_compile.compiler.schedules import schedule_names
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.paths import as_path
from fairy_compile.results import check_directory
from fairy_compile.targets import Target, load_target, schedules_directory
from fairy_compile.tune.crew import local_crew, rpc_crew
from fairy_compile.tune.measure import STREAM_BYTES
from fairy_compile.tune.records import Record, read_records
from fairy_compile.tune.report import REPORT, rows_of, write_html
from fairy_compile.tune.run import Run, Watch
from fairy_compile.tune.settings import Settings
from fairy_compile.tune.tasks import Task, tasks_of
from fairy_compile.tune.trials import Journal
from fairy_compile.tune.versions import versions_text
from fairy_compile.tvm_pair import check_tvm_pair

JOURNAL = "trials.jsonl"
_LIBRARIES = "work"


@dataclass(frozen=True)
class TuneReport:
    """What a run came to.

    Attributes:
        target: its name.
        records: one a task, in the order of the tasks.
        tasks: those of ``records``.
        journal: of all trials.
        schedule: the file that the records are in.
        dropped: device -> why it was dropped.
        resumed: whether an earlier session was gone on with.
        unfinished: tasks without a record yet.
        saved: whether ``schedule`` holds the records; a run that is only read may have put them
            elsewhere.
        page: the report as HTML, None where it was not written.
    """

    target: str
    records: tuple[Record, ...]
    tasks: tuple[Task, ...]
    journal: Journal
    schedule: Path
    dropped: dict[str, str]
    resumed: bool
    unfinished: int = 0
    saved: bool = True
    page: Path | None = None


def tune(
    model: str | Path,
    *,
    target: str = "cpu",
    quant: QuantConfig | None = None,
    settings: Settings | None = None,
    output: str | Path | None = None,
    schedules: str | Path | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> TuneReport:
    """Tune the kernels of a model for a target, and write what was found for `build` to read.

    Args:
        model: an artifact, a model directory, or a hub id; see `tasks.tasks_of`.
        target: name of a file in ``targets/``.
        quant: how a model becomes codes; a packed checkpoint knows, and an artifact refuses it.
        settings: budgets, and where to measure.
        output: directory of the run's journal, default ``tune-<target>``; an unfinished run there
            is gone on with.
        schedules: directory of schedule files, default the one that `build` reads.
        force: start anew.
        watch: called often with the `Status`.

    Raises:
        FairyError: there is nothing to tune, the target's code does not run where it is to be
            measured, ``schedules`` cannot be written, or no device is left.
    """
    settings, compile_for, tasks = _problem(model, target, quant, settings)
    place = _place(output, target)
    schedule = _schedule(schedules, compile_for)
    # A damaged file, or one that cannot be written, is told before the hours of work, not after.
    check_directory("--schedules", schedule.parent)
    read_records(schedule)
    with journal_of(place, _identity(settings, target), force) as journal, work_of(place) as work:
        stream = min(STREAM_BYTES, max(1 << 20, _model_bytes(tasks)))
        crew = (
            rpc_crew(settings, compile_for, work)
            if settings.rpc
            else local_crew(settings, compile_for, work, stream)
        )
        with crew:
            run = Run(tasks, compile_for, settings, crew, journal, work, schedule, watch)
            records = run()
    done = [t for t in tasks if t.id in journal.finished]
    report = TuneReport(
        target=target,
        records=tuple(records),
        tasks=tuple(done),
        journal=journal,
        schedule=schedule,
        dropped=dict(journal.dropped),
        resumed=journal.resumed,
        unfinished=len(tasks) - len(done),
    )
    return _with_page(report, place)


def read_run(
    model: str | Path,
    *,
    target: str = "cpu",
    quant: QuantConfig | None = None,
    settings: Settings | None = None,
    output: str | Path | None = None,
    schedules: str | Path | None = None,
) -> TuneReport:
    """Return what a run has found so far, from its journal; arguments as of `tune`.

    Raises:
        FairyError: there is no such run.
    """
    settings, compile_for, tasks = _problem(model, target, quant, settings)
    place = _place(output, target)
    if not (place / JOURNAL).is_file():
        raise FairyError(f"{place} holds no run ({JOURNAL}); give -o DIR of one, or tune first")
    journal = Journal(place / JOURNAL, _identity(settings, target), read_only=True)
    done = [t for t in tasks if t.id in journal.finished]
    records = tuple(Record.from_table(journal.finished[t.id], JOURNAL) for t in done)
    schedule = _schedule(schedules, compile_for)
    held = {record.to_text() for record in read_records(schedule)}
    report = TuneReport(
        target=target,
        records=records,
        tasks=tuple(done),
        journal=journal,
        schedule=schedule,
        dropped=dict(journal.dropped),
        resumed=True,
        unfinished=len(tasks) - len(done),
        saved=all(record.to_text() in held for record in records),
    )
    return _with_page(report, place)


def _problem(
    model: str | Path, target: str, quant: QuantConfig | None, settings: Settings | None
) -> tuple[Settings, Target, list[Task]]:
    """Return the settings, the target and what is to be tuned; arguments as of `tune`."""
    check_tvm_pair()
    settings = settings or Settings()
    compile_for = load_target(target)
    tasks = tasks_of(model, compile_for, quant, settings.rows)
    return settings, compile_for, tasks


def _place(output: str | Path | None, target: str) -> Path:
    return as_path("the output", output or f"tune-{target}")


def _identity(settings: Settings, target: str) -> dict[str, Any]:
    return settings.identity | {"target": target, "versions": versions_text()}


def _schedule(folder: str | Path | None, target: Target) -> Path:
    directory = as_path("schedules", folder) if folder else schedules_directory()
    return directory / f"{schedule_names(target)[-1]}.toml"


def _with_page(report: TuneReport, place: Path) -> TuneReport:
    page = place / REPORT
    title = f"Tuned for {report.target}"
    write_html(page, title, rows_of(report.tasks, report.records, report.journal), report.journal)
    return replace(report, page=page)


def _model_bytes(tasks: Sequence[Task]) -> int:
    return sum(t.calls * t.weight_bytes for t in tasks if t.batch == "single")


@contextmanager
def journal_of(place: Path, identity: dict[str, Any], force: bool) -> Iterator[Journal]:
    """Open the journal of a run in ``place``, which is made; with ``force``, a new one."""
    path = place / JOURNAL
    try:
        place.mkdir(parents=True, exist_ok=True)
        if force:
            path.unlink(missing_ok=True)
        journal = Journal(path, identity)
    except OSError as error:
        raise FairyError(f"cannot write {path}: {error.strerror or error}; give -o DIR") from error
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def work_of(place: Path) -> Iterator[Path]:
    """Yield a directory for libraries that is gone afterwards; so is what a killed run left."""
    work = place / _LIBRARIES
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
