"""``fairy_compile tune``: kernels' knobs by measurement, on this machine or devices elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json
from fairy_compile.config import ACT_CONTRACTS, QUANTS

if TYPE_CHECKING:
    from fairy_compile.tune.api import TuneReport
    from fairy_compile.tune.tasks import Task

# Optional[] and not "| None": typer reads these annotations at run time.


def tune(
    model: Annotated[
        str, typer.Argument(help="Directory that `build` wrote, model directory, or hub id.")
    ],
    target: options.Target = "cpu",
    trials: Annotated[int, typer.Option("--trials", help="Candidates to measure in all.")] = 200,
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--minutes", help="Time to spend  [default: no limit]"),
    ] = None,
    patience: Annotated[
        int, typer.Option("--patience", help="Trials without gain that end a task; 0 for never.")
    ] = 40,
    rpc: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--rpc",
            metavar="HOST:PORT",
            help="Measure on the devices of a TVM RPC tracker, in a trusted network only.",
        ),
    ] = None,
    key: Annotated[str, typer.Option("--key", help="Name of the devices at the tracker.")] = "",
    rows: Annotated[
        str, typer.Option("--rows", help="Rows of x that stand for batches and prompts.")
    ] = "4,128",
    threads: options.Threads = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds to build or measure a candidate.")
    ] = 120.0,
    builders: Annotated[int, typer.Option("--builders", help="Build processes.")] = 2,
    linker: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--linker",
            metavar="COMMAND",
            help="Links libraries for the device, e.g. 'aarch64-linux-android24-clang -shared'.",
        ),
    ] = None,
    search: Annotated[
        str, typer.Option("--search", help="model (learns from trials) or random.")
    ] = "model",
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same order of trials.")] = 0,
    quant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--quant", help=f"Bits per weight: {', '.join(QUANTS)}  [default: w2]"),
    ] = None,
    scale: options.Scale = None,
    layer_quant: options.LayerQuant = None,
    act: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--act", help=f"Activations: {', '.join(ACT_CONTRACTS)}  [default: int8]"),
    ] = None,
    exempt: options.Exempt = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Where trials are noted; a run that was stopped goes on  [default: tune-TARGET]",
        ),
    ] = None,
    schedules: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--schedules", metavar="DIR", help="Where the result goes  [default: what build reads]"
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Show what a run found so far; measure nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the tasks; measure nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start anew.")] = False,
    json: options.Json = False,
) -> None:
    """Choose kernels' knobs by measuring them; `build` reads the result."""
    from fairy_compile.config import QuantConfig
    from fairy_compile.tune.settings import Settings, parse_address, parse_rows
    from fairy_compile.tune.tasks import refuse_other_codes
    from fairy_compile.tvm_pair import check_tvm_pair

    settings = Settings(
        trials=trials,
        minutes=minutes,
        patience=patience,
        timeout=timeout,
        builders=builders,
        threads=threads,
        rows=parse_rows(rows),
        search=search,
        seed=seed,
        rpc=parse_address(rpc) if rpc else None,
        key=key,
        linker=tuple(shlex.split(linker)) if linker else (),
    )
    # None asks for nothing: an artifact brings its own.
    config = None
    if any(given is not None for given in (quant, scale, act, exempt, layer_quant)):
        config = QuantConfig(
            quant or "w2",
            scale=scale or "tensor",
            act=act or "int8",
            exempt=tuple(exempt or ()),
            stages_for=options.parse_layer_quant(layer_quant),
        )
        given = {"quant": quant, "scale": scale, "stages_for": layer_quant and config.stages_for}
        refuse_other_codes(model, {name: v for name, v in given.items() if v is not None})
    check_tvm_pair()
    if dry_run:
        from fairy_compile.targets import load_target
        from fairy_compile.tune.tasks import tasks_of

        _print_tasks(tasks_of(model, load_target(target), config, settings.rows), json)
        return
    from fairy_compile.tune.api import read_run
    from fairy_compile.tune.api import tune as run
    from fairy_compile.tune.display import live

    places = {"target": target, "quant": config, "settings": settings, "output": output,
              "schedules": schedules}  # fmt: skip
    if report:
        result = read_run(model, **places)
    else:
        with live() as watch:
            result = run(model, **places, force=force, watch=watch)
    _print_report(result, json, wrote=not report)


def _print_tasks(tasks: list[Task], json: bool) -> None:
    from fairy_compile.tune.space import Space

    rows = [(t.text, t.kernel_name, t.batch, t.calls, Space.of(t).size) for t in tasks]
    if json:
        names = ("task", "kernel", "batch", "calls", "settings")
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    from fairy_compile.results import aligned_table

    titles = ("task", "kernel", "batch", "calls", "settings")
    cells = [tuple(map(str, row)) for row in rows]
    typer.echo(aligned_table(titles, cells, {"calls", "settings"}))
    typer.echo("dry run: nothing was measured")


def _print_report(result: TuneReport, json: bool, *, wrote: bool) -> None:
    from fairy_compile.tune.report import failures, render, rows_of

    rows = rows_of(result.tasks, result.records, result.journal)
    if json:
        print_json(
            {
                "target": result.target,
                "tasks": [row.to_json() for row in rows],
                "trials": len([t for t in result.journal.trials if t.counts]),
                "seconds": result.journal.seconds,
                "dropped": result.dropped,
                "resumed": result.resumed,
                "unfinished": result.unfinished,
                "schedule": str(result.schedule),
                "saved": result.saved,
                "report": str(result.page) if result.page else None,
            }
        )
        return
    if rows:
        typer.echo(render(rows))
    for line in failures(result.journal):
        typer.echo(f"note: {line}")
    if result.unfinished and wrote:
        typer.echo(
            f"{result.unfinished} tasks had no trial before the budget was spent; the same command "
            "goes on with more --minutes or --trials, which count those of all sessions"
        )
    elif result.unfinished:
        typer.echo(f"{result.unfinished} tasks are not finished; the same command goes on")
    if result.records and (wrote or not result.unfinished):
        typer.echo(_where(result, wrote))
    if result.page:
        typer.echo(f"wrote {result.page}")


def _where(result: TuneReport, wrote: bool) -> str:
    """Say where the records of a finished run are, and what `build` needs to read them."""
    from fairy_compile.targets import schedules_directory

    schedule, reads = result.schedule, f"`build --target {result.target}` reads"
    if not result.saved:
        return f"{schedule} does not hold all of this; give --schedules DIR as the run had it"
    holds = f"wrote {schedule}" if wrote else f"{schedule} holds this"
    if schedule.parent.resolve() == schedules_directory().resolve():
        return f"{holds}, which {reads}"
    return f"{holds}; copy its tables to {schedules_directory() / schedule.name}, which {reads}"
