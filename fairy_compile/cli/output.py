"""Printing: JSON, progress bars, tables of layers, and text a model wrote."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def write_text(text: str) -> None:
    """Print a piece of text at once, without a line break.

    On a terminal, control characters other than line breaks and tabs are replaced: a model's
    output must not be able to drive it.
    """
    if sys.stdout.isatty():
        text = "".join(
            "\N{REPLACEMENT CHARACTER}"
            if unicodedata.category(letter) == "Cc" and letter not in "\n\t"
            else letter
            for letter in text
        )
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr while the block runs; yields ``progress(what, done, total)``.

    Nothing is shown where stderr is not a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield progress


def fold_layers(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, int, tuple]]:
    """Join rows that differ only in the layer's number.

    Args:
        rows: (layer name, cells).

    Returns:
        (name with the range of numbers, count, cells), in order of first appearance; e.g.
        ``("model.layers.0-31.mlp.down_proj", 32, ...)``.
    """
    groups: dict[tuple[str, str, tuple], list[int]] = {}
    for name, cells in rows:
        match = re.search(r"\.(\d+)\.", name)
        head, number, tail = (
            (name[: match.start(1)], int(match[1]), name[match.end(1) :])
            if match
            else (name, 0, "")
        )
        groups.setdefault((head, tail, cells), []).append(number)
    return [
        (f"{head}{_ranges(numbers)}{tail}" if tail else head, len(numbers), cells)
        for (head, tail, cells), numbers in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Return e.g. ``0-3,7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def print_layers(titles: Sequence[str], rows: Iterable[tuple[str, tuple[str, ...]]]) -> None:
    """Print a table of layers, folded, on stdout.

    Args:
        titles: of the cells.
        rows: (layer name, cells).
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("layer")
    table.add_column("calls", justify="right")
    for title in titles:
        table.add_column(title)
    for name, count, cells in fold_layers(rows):
        table.add_row(escape(name), str(count), *map(escape, cells))
    # Where nobody looks, lines are for grep: never cut to a width of 80.
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)
