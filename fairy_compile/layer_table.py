"""Tables of layers for the terminal: one row for layers that differ only in their number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LayerRow = tuple[str, tuple[str, ...], str]
"""(layer name, cells, why): the cells go into columns, reasons below the table."""


def printable(text: str) -> str:
    """Return text that came from a file with its control characters shown, not obeyed."""
    return text if text.isprintable() else ascii(text)


def render_layers(console: Console, titles: Sequence[str], rows: Iterable[LayerRow]) -> None:
    """Print a table of layers, and below it each reason once with the number of its layers.

    Args:
        console: where to.
        titles: of the cells.
        rows: one per layer.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    rows = list(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    table.add_column("calls", justify="right")
    for title in titles:
        table.add_column(title, overflow="fold")
    for name, count, cells in fold_layers((name, cells) for name, cells, _ in rows):
        shown = (name.removeprefix("model."), str(count), *cells)
        table.add_row(*(escape(printable(text)) for text in shown))
    console.print(table)
    for why, count in Counter(why for _, _, why in rows if why).most_common():
        console.print(f"{count} of {len(rows)}: {escape(printable(why))}", highlight=False)


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
