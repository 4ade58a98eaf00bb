"""Tuning this CPU for LLaMA-2-7B's calls: how long it takes, what it gains, and search by random.

Three steps, each a few minutes to a quarter of an hour on a quiet machine with two cores:

    python benchmarks/tune_x86.py tune -o tune-7b          # 500 trials; writes tune-7b/<cpu>.toml
    python benchmarks/tune_x86.py gains -o tune-7b         # defaults beside tuned knobs, in turns
    python benchmarks/tune_x86.py search -o tune-7b        # model search and random, 5 seeds

``tune`` also looks for processes and files that a run left behind. ``gains`` measures anew what
``tune`` chose, and fails if anything is slower than the defaults by more than 2 %. ``search``
measures every setting of one call once, so that both searches can be replayed on the same numbers.
To ship the result, copy the tables of tune-7b/<cpu>.toml to schedules/<cpu>.toml, or give
``--schedules schedules`` to ``tune``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fairy_compile.bench.machine import Machine
from fairy_compile.compiler.schedules import schedule_names
from fairy_compile.kernels import FAMILIES
from fairy_compile.op import PhaseSpec
from fairy_compile.results import markdown_table
from fairy_compile.targets import load_target
from fairy_compile.tune.builder import BuildRequest
from fairy_compile.tune.crew import Crew, local_crew
from fairy_compile.tune.measure import CONFIRM, STREAM_BYTES, Measured, MeasureRequest
from fairy_compile.tune.records import read_records
from fairy_compile.tune.report import NUMBERS, REPORT, TITLES, failures, rows_of, write_html
from fairy_compile.tune.run import Run, Status
from fairy_compile.tune.search import FAILED, ModelSearch, RandomSearch
from fairy_compile.tune.session import TaskRun
from fairy_compile.tune.settings import Settings
from fairy_compile.tune.space import Space
from fairy_compile.tune.tasks import Task, collect
from fairy_compile.tune.trials import Journal
from fairy_compile.tune.workers import wait

# (complex rows of the fused parts, complex columns): q/k/v, o, gate/up, down.
CALLS = [((2048, 2048, 2048), 2048), ((2048,), 2048), ((5504, 5504), 2048), ((2048,), 5504)]
TARGET = load_target("cpu")
SEEDS = range(5)

app = typer.Typer(add_completion=False)
Output = Annotated[Path, typer.Option("-o", "--output", help="Directory of the run.")]
Isa = Annotated[str, typer.Option(help="Kernel whose name ends in this, e.g. avx2.")]
Stages = Annotated[int, typer.Option(help="T, bits per weight.")]
Act = Annotated[str, typer.Option(help="Activations: int8, int16 or float.")]
Scale = Annotated[str, typer.Option(help="A scale for each tensor, row or tile64.")]


def tasks_7b(isa: str, stages: int, act: str, scale: str) -> list[Task]:
    """Return the tasks of LLaMA-2-7B, one sequence and several."""
    specs = [PhaseSpec(parts, m, stages, ("U", "W"), scale, act) for parts, m in CALLS]
    kernels = [k for k in FAMILIES["x86.codebook"] if k.unsupported(specs[0], TARGET) is None]
    kernel = next((k for k in kernels if k.name.endswith(isa)), None)
    if kernel is None:
        sys.exit(f"no kernel {isa!r} runs here; there are {[k.name for k in kernels]}")
    return collect([(kernel, spec, {}) for spec in specs * 32], (4, 128))


def crew_for(settings: Settings, work: Path) -> Crew:
    return local_crew(settings, TARGET, work, STREAM_BYTES)


@app.command()
def tune(
    output: Output = Path("tune-7b"),
    trials: Annotated[int, typer.Option(help="Candidates in all.")] = 500,
    isa: Isa = "",
    stages: Stages = 2,
    act: Act = "int8",
    scale: Scale = "tensor",
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
    schedules: Annotated[Path | None, typer.Option(help="Default: the output.")] = None,
) -> None:
    """Tune, and say how long it took and what was left behind."""
    settings = Settings(trials=trials, patience=0, threads=threads)
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    before = set(os.listdir("/tmp"))
    tasks = tasks_7b(isa, stages, act, scale)
    schedule = (schedules or output) / f"{schedule_names(TARGET)[-1]}.toml"
    call = {"isa": isa, "stages": stages, "act": act, "scale": scale}
    journal = Journal(output / "trials.jsonl", settings.identity | call)
    start, last = time.monotonic(), [0.0]

    def watch(status: Status) -> None:
        if time.monotonic() - last[0] > 20 and status.run:
            last[0] = time.monotonic()
            run = status.run
            print(f"{status.seconds:6.0f} s  {status.trials:3d} trials  {run.task.text} "
                  f"{run.task.batch} best {1 / run.best:.3f}x", flush=True)  # fmt: skip

    with crew_for(settings, work) as crew:
        workers = [w.pid for w in crew.workers]
        records = Run(tasks, TARGET, settings, crew, journal, work, schedule, watch)()
        workers += [w.pid for w in crew.workers]
    minutes = (time.monotonic() - start) / 60
    alive = [pid for pid in set(workers) if Path(f"/proc/{pid}").exists()]
    left = [p for p in work.iterdir() if p.suffix != ".log"]
    left += [Path("/tmp", name) for name in set(os.listdir("/tmp")) - before]
    counted = sum(t.counts for t in journal.trials)
    rows = rows_of(tasks, records, journal)
    machine = Machine.here()
    text = "\n".join(
        [
            f"{counted} trials in {minutes:.1f} minutes on {machine.cpu}, {machine.cores} cores, "
            f"load average at the end {machine.load_average:.1f}; processes left: {len(alive)}, "
            f"files left: {len(left)} {left[:5] or ''}",
            "",
            markdown_table(TITLES, [row.cells() for row in rows], NUMBERS),
            "",
            *failures(journal),
        ]
    )
    print(text)
    (output / "tune.md").write_text(text + "\n", "utf-8")
    write_html(output / REPORT, "LLaMA-2-7B's calls", rows, journal)
    journal.close()


def serve(worker, request, timeout: float = 300.0):
    worker.submit(request, timeout)
    while (reply := worker.poll()) is None:
        wait([worker], 5)
    return reply


@app.command()
def gains(
    output: Output = Path("tune-7b"),
    isa: Isa = "",
    stages: Stages = 2,
    act: Act = "int8",
    scale: Scale = "tensor",
    repeats: Annotated[int, typer.Option(help="Processes that compare each call.")] = 3,
    schedules: Annotated[Path | None, typer.Option(help="Default: the output.")] = None,
) -> None:
    """Measure defaults and tuned knobs in turns, once more."""
    records = read_records((schedules or output) / f"{schedule_names(TARGET)[-1]}.toml")
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    lines, worst, best = [], 0.0, 10.0
    with crew_for(Settings(builders=1), work) as crew:
        for task in tasks_7b(isa, stages, act, scale):
            record = next(
                (r for r in records if (r.task, r.batch, r.kernel)
                 == (task.text, task.batch, task.kernel_name)), None
            )  # fmt: skip
            if record is None:
                sys.exit(f"there is no record of {task.key}; run the step `tune` first")
            space = Space.of(task)
            libraries = []
            for knobs in (space.knobs(space.points()[0]), dict(record.values)):
                built = serve(crew.builders[0], BuildRequest(task, knobs, work)).value
                libraries.append(built.path)
            request = MeasureRequest(task, libraries[1], libraries[0], CONFIRM)
            found: list[Measured] = []
            for _ in range(repeats):  # where arrays lie in memory matters: a process for each
                crew.slots[0].worker.restart()
                found.append(serve(crew.slots[0].worker, request).value)
            for i, rows in enumerate(task.rows):
                ratios = [m.ratios[i] for m in found]
                ratio = statistics.median(ratios)
                worst, best = max(worst, ratio), min(best, ratio)
                before, after = (
                    statistics.median(getattr(m, name)[i] for m in found) * 1e6
                    for name in ("default_seconds", "seconds")
                )
                lines.append(
                    (task.text, task.batch, str(rows), f"{before:.1f}", f"{after:.1f}",
                     f"{1 / ratio:.3f}x", f"{1 / max(ratios):.3f} .. {1 / min(ratios):.3f}",
                     ", ".join(f"{k}={v}" for k, v in record.values.items()) or "defaults")
                )  # fmt: skip
                print("  ".join(lines[-1]), flush=True)
            for path in set(libraries):
                path.unlink(missing_ok=True)
    titles = ("task", "batch", "rows", "default us", "tuned us", "gain", "least .. most", "knobs")
    machine = Machine.here()
    text = (
        f"Comparisons of each call in turns, in {repeats} processes, on {machine.cpu}, "
        f"{machine.cores} threads; gains from {1 / worst:.3f}x to {1 / best:.3f}x\n\n"
        + markdown_table(titles, lines, {*titles} - {"task", "batch", "knobs"})
    )
    (output / "gains.md").write_text(text + "\n", "utf-8")
    print(f"gains from {1 / worst:.3f}x to {1 / best:.3f}x")
    if worst > 1.02:
        sys.exit("something is slower than the defaults")


@app.command()
def search(
    output: Output = Path("tune-7b"),
    isa: Isa = "",
    stages: Stages = 2,
    act: Act = "int8",
    scale: Scale = "tensor",
    trials: Annotated[int, typer.Option(help="Trials that each search may spend.")] = 32,
) -> None:
    """Measure all settings of o's function for batches once, and replay both searches on them."""
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    (task,) = [
        t
        for t in tasks_7b(isa, stages, act, scale)
        if t.text.startswith("4096x4096") and t.batch != "single"
    ]
    space = Space.of(task)
    settings = Settings(trials=space.size, patience=0)
    call = {"isa": isa, "stages": stages, "act": act, "scale": scale}
    journal = Journal(output / "surface.jsonl", call)
    with crew_for(settings, work) as crew:
        run = TaskRun(
            task, crew, journal, RandomSearch(space), work,
            patience=0, clock=lambda: 0.0, watch=lambda: None,
        )  # fmt: skip
        run.run(space.size, None)
        for path in run.libraries.values():
            path.unlink(missing_ok=True)
    surface = {point: trial.score for point, trial in run.trials.items()} | {run.default: 1.0}
    table = [[space.knobs(p), round(s, 4)] for p, s in sorted(surface.items())]
    (output / "surface.json").write_text(json.dumps(table), "utf-8")
    best = min(surface.values())
    print(f"{len(surface)} of {space.size} settings; best {1 / best:.3f}x of the default")
    for kind in (ModelSearch, RandomSearch):
        ends = []
        for seed in SEEDS:
            strategy, seen = kind(space, seed), {}
            while len(seen) < trials:
                for point in strategy.ask(min(6, trials - len(seen))):
                    seen[point] = surface.get(point, FAILED)
                    strategy.tell(point, seen[point])
            ends.append(1 / min(seen.values()))
        shown = ", ".join(f"{gain:.3f}" for gain in ends)
        mean = statistics.fmean(ends)
        print(f"{kind.__name__:12s} {trials} trials, seeds 0-4: {shown}; mean {mean:.3f}x")


if __name__ == "__main__":
    app()
