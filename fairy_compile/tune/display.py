"""Live progress in a terminal: tasks, best so far, rate and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fairy_compile.tune.run import Status, Watch
from fairy_compile.tune.trials import OK


def line_of(status: Status) -> str:
    """Return the state of the search under way in one line; empty between searches."""
    run = status.run
    if run is None:
        return ""
    best = max(1.0, 1 / run.best)
    text = f"{run.task.text} {run.task.batch}: best {best:.2f}x of the default"
    ranked = run.ranked()
    if ranked:
        trial = run.trials[ranked[0]]
        text += f", {run.task.weight_bytes / trial.seconds[0] / 1e9:.1f} GB/s"
    failed = sum(t.status not in (OK, "duplicate") for t in run.trials.values())
    if failed:
        text += f", {failed} failed"
    return text


def seconds_left(status: Status) -> float | None:
    """Return how long the rest of the trials would take at the rate so far."""
    if not status.trials:
        return None
    return status.seconds / status.trials * max(0, status.limit - status.trials)


@contextmanager
def live() -> Iterator[Watch | None]:
    """Show a table of tasks and a bar on stderr; yields the function that takes `Status`.

    Nothing is shown, and None yielded, where stderr is not a terminal.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, transient=True, refresh_per_second=4) as screen:
        yield lambda status: screen.update(picture(status))


def picture(status: Status) -> Any:
    """Return what `live` shows."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("task", "batch", "trials", "gain", "state"):
        table.add_column(title, justify="right" if title in ("trials", "gain") else "left")
    for task in status.tasks:
        record = status.finished.get(task.id)
        active = status.run is not None and status.run.task.id == task.id
        if record is not None:
            knobs = ", ".join(f"{k}={v}" for k, v in record.values.items()) or "defaults are best"
            cells = ("", f"{record.gain:.2f}x", knobs)
        elif active and status.run is not None:
            best = max(1.0, 1 / status.run.best)
            cells = (str(status.run.counted), f"{best:.2f}x", "searching")
        else:
            cells = ("", "", "waiting")
        table.add_row(task.text, task.batch, *map(Text, cells))
    left = seconds_left(status)
    eta = "" if left is None else f", about {left / 60:.0f} min left"
    devices = ", ".join(status.devices)
    lines = [f"{status.trials} of {status.limit} trials{eta}; on {devices}", line_of(status)]
    lines += [f"dropped {name}: {why}" for name, why in status.dropped.items()]
    bar = ProgressBar(total=status.limit, completed=status.trials, width=60)
    return Group(table, bar, *(Text(line) for line in lines if line))
