"""`evaluate_tasks`: tasks of the lm-eval harness."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fairy_compile.artifact.manifest import Manifest
from fairy_compile.bench.machine import PACKAGES, Machine, versions
from fairy_compile.bench.result import RunFacts
from fairy_compile.bench.run import model_facts
from fairy_compile.errors import FairyError, nearest
from fairy_compile.paths import as_path


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task.

    Attributes:
        task: its name; of a group the group's.
        version: of the task's definition.
        shots: examples before each question; None for groups.
        examples: how many were run; None for groups.
        metric: name and filter, e.g. ``acc_norm,none``.
        value: the figure.
        stderr: its standard error, if the harness has one.
    """

    task: str
    version: str
    shots: int | None
    examples: int | None
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult(RunFacts):
    """Tasks of lm-eval on one artifact.

    Attributes, beside those of `RunFacts`:
        seconds: wall-clock time of the harness.
        limit: most examples a task; None is all: a limit makes figures that are not to be quoted.
        rows: the figures.
    """

    seconds: float
    limit: int | None
    rows: tuple[TaskRow, ...]


def check_extra() -> None:
    """Raise `FairyError` with the pip command unless lm-eval is there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise FairyError(
            '--tasks needs lm-eval, which this Python lacks; run pip install "fairy-compile[eval]"'
        )


def evaluate_tasks(
    directory: Path | str,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: Path | str | None = None,
    apply_chat_template: bool = False,
    context: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    cpus: Collection[int] | None = None,
    command: str = "fairy_compile.evaluation.evaluate_tasks",
) -> TaskResult:
    """Run tasks of the lm-eval harness; it downloads their data where they are not on disk.

    Args:
        directory: what ``fairy_compile build`` wrote.
        tasks: names of tasks or groups, e.g. ``hellaswag``.
        num_fewshot: examples before each question; default the task's own.
        limit: most examples a task; default all.
        include_path: directory with further task files (YAML).
        apply_chat_template: ask as in a chat.
        context: most tokens of a sequence; default the model's.
        device: TVM device; default the one the artifact was built for.
        threads: CPU threads; default one a physical core.
        cpus: numbers of the CPUs they may run on; default all this process may.
        command: recorded in the result.

    Raises:
        FairyError: lm-eval is not installed, or a task or an argument is unknown.
    """
    check_extra()
    if not tasks:
        raise FairyError("--tasks names no task; write names separated by commas")
    for name, value, least in (("--num-fewshot", num_fewshot, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise FairyError(f"{name} is {value}; allowed: {least} or more")
    directory = as_path("the artifact", directory)
    machine = Machine.here()
    manifest = Manifest.load(directory)
    manifest.check_language_model(directory)
    if include_path is not None and not Path(include_path).is_dir():
        raise FairyError(f"--include-path {include_path} is no directory of task files")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from fairy_compile.evaluation.lm_eval_model import FairyCompileLM
    from fairy_compile.runtime import load

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = list(manager.all_tasks)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise FairyError(
                f"lm-eval knows no task {task!r}.{nearest(task, known)} Its own list: "
                "lm-eval ls tasks"
            )
    with load(
        directory, device, threads=threads, cpus=cpus, max_sequences=1, context=context
    ) as model:
        started = time.perf_counter()
        found = lm_eval.simple_evaluate(
            FairyCompileLM(model),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
            log_samples=False,
        )
        return TaskResult(
            model=model_facts(directory, manifest, str(model.engine.device)),
            machine=machine,
            versions=versions((*PACKAGES, "lm-eval")),
            command=command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            threads=model.engine.threads,
            seconds=time.perf_counter() - started,
            limit=limit,
            rows=tuple(_rows(found)),
        )


def _rows(found: Any) -> list[TaskRow]:
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{name}_stderr,{kind}")
            rows.append(
                TaskRow(
                    task=task,
                    version=str(found.get("versions", {}).get(task, "-")),
                    shots=found.get("n-shot", {}).get(task),
                    examples=found.get("n-samples", {}).get(task, {}).get("effective"),
                    metric=key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                )
            )
    return rows
