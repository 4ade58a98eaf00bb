"""Printing: JSON, progress bars, tables of layers, and text a model wrote."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from fairy_compile.layer_table import LayerRow, render_layers


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
    """Show a bar and the time left on stderr; yields ``progress(what, done, total)``.

    Nothing is shown where stderr is not a terminal.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield progress


def print_layers(titles: Sequence[str], rows: Iterable[LayerRow]) -> None:
    """Print a table of layers on stdout; see `layer_table.render_layers`."""
    from rich.console import Console

    # Where nobody looks, lines are for grep: never cut to a width of 80.
    console = Console()
    render_layers(console if console.is_terminal else Console(width=240), titles, rows)
