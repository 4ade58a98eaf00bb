"""What a run found: a table of tasks, before and after, and the course of every search."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairy_compile.results import aligned_table, save_files
from fairy_compile.tune.records import Record
from fairy_compile.tune.tasks import Task
from fairy_compile.tune.trials import OK, Journal, Trial

TITLES = ("task", "batch", "rows", "default us", "tuned us", "gain", "±", "GB/s", "of read",
          "GOP/s", "trials", "knobs")  # fmt: skip
NUMBERS = {*TITLES} - {"task", "batch", "knobs"}
REPORT = "report.html"


@dataclass(frozen=True)
class Row:
    """One task with one number of rows of x.

    Attributes:
        task: the task.
        record: what was found.
        rows: of x.
        default_us, tuned_us: microseconds of a call.
        trials: that the task took.
        gb_per_s: packed weights read.
        read_share: of the rate of plain reads; None where that is not known, where the call is
            bound by arithmetic rather than by reading weights (many rows), and where the model's
            weights may stay in caches.
        gop_per_s: multiplies and adds of the real map.
    """

    task: Task
    record: Record
    rows: int
    default_us: float
    tuned_us: float
    trials: int
    gb_per_s: float
    read_share: float | None
    gop_per_s: float

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of `TITLES`."""
        knobs = ", ".join(f"{k}={v}" for k, v in sorted(self.record.values.items())) or "defaults"
        demands = "".join(f" ({k}={v})" for k, v in sorted(self.record.demands.items()))
        gain = self.default_us / self.tuned_us if self.tuned_us else 1.0
        share = "-" if self.read_share is None else f"{self.read_share:.0%}"
        return (
            f"{self.task.text}{demands}",
            self.task.batch,
            str(self.rows),
            f"{self.default_us:.1f}",
            f"{self.tuned_us:.1f}",
            f"{gain:.2f}x",
            f"{self.record.spread:.1%}",
            f"{self.gb_per_s:.1f}",
            share,
            f"{self.gop_per_s:.0f}",
            str(self.trials),
            knobs,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "task": self.task.text,
            "kernel": self.task.kernel_name,
            "batch": self.task.batch,
            "calls": self.task.calls,
            "rows": self.rows,
            "default_us": self.default_us,
            "tuned_us": self.tuned_us,
            "gain": self.record.gain,
            "spread": self.record.spread,
            "values": dict(self.record.values),
            "demands": dict(self.record.demands),
            "trials": self.trials,
            "gb_per_s": round(self.gb_per_s, 3),
            "read_share": self.read_share,
            "gop_per_s": round(self.gop_per_s, 3),
            "device": self.record.device,
        }


_CACHED = 64 << 20  # bytes of a model's weights that a large cache may keep
_FEW = 8  # rows of x up to which a call is bound by reading weights rather than by arithmetic


def rows_of(tasks: Sequence[Task], records: Sequence[Record], journal: Journal) -> list[Row]:
    """Return the report's rows: one for each number of rows of each task that is finished."""
    found = []
    model_bytes = sum(t.calls * t.weight_bytes for t in tasks if t.batch == "single")
    read = journal.read_bytes_per_second if model_bytes > _CACHED else 0.0
    for task, record in zip(tasks, records, strict=True):
        trials = sum(t.counts for t in journal.trials if t.task == task.id)
        for rows, before, after in zip(
            record.rows, record.default_us, record.median_us, strict=True
        ):
            seconds = after / 1e6
            rate = task.weight_bytes / seconds if seconds else 0.0
            share = round(rate / read, 4) if read and rows <= _FEW else None
            operations = task.operations(rows) / seconds if seconds else 0.0
            found.append(
                Row(task, record, rows, before, after, trials, rate / 1e9, share, operations / 1e9)
            )
    return found


def render(rows: Sequence[Row]) -> str:
    """Return the rows as a table in columns."""
    return aligned_table(TITLES, [row.cells() for row in rows], NUMBERS)


def failures(journal: Journal) -> list[str]:
    """Return how many trials ended how, with one reason each, in words."""
    lines = []
    for status in ("wrong", "build", "crash", "timeout"):
        bad = [t for t in journal.trials if t.status == status]
        if bad:
            words = {"wrong": "gave wrong numbers", "build": "did not build",
                     "crash": "crashed", "timeout": "did not answer in time"}  # fmt: skip
            lines.append(f"{len(bad)} of the candidates {words[status]}, e.g.: {bad[0].reason}")
    lines += [f"device {name} was dropped: {why}" for name, why in journal.dropped.items()]
    return lines


def convergence(trials: Sequence[Trial]) -> list[float]:
    """Return the gain over the default after each counted trial of a task."""
    best, course = 1.0, []
    for trial in trials:
        if trial.status == OK:
            best = min(best, trial.score)
        if trial.counts:
            course.append(1 / best)
    return course


def write_html(path: Path, title: str, rows: Sequence[Row], journal: Journal) -> None:
    """Write the table and a plot of every search as a page that needs nothing else.

    Raises:
        FairyError: it cannot be written.
    """
    page = _page(title, rows, journal)
    save_files([path], lambda partial: partial.write_text(page, "utf-8"))


_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; } .n { text-align: right; }
svg { background: #fafafa; } polyline { fill: none; stroke-width: 1.5; }
"""
_COLOURS = ("#1b6ca8", "#c0392b", "#27824d", "#8e44ad", "#b9770e", "#16808a", "#7f3b52", "#555")


def _page(title: str, rows: Sequence[Row], journal: Journal) -> str:
    escape = html.escape
    head = "".join(f"<th{_right(t)}>{escape(t)}</th>" for t in TITLES)
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    notes = "".join(f"<li>{escape(line)}</li>" for line in failures(journal))
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><table><tr>{head}</tr>\n{body}</table>\n<ul>{notes}</ul>"
        f"<h2>Gain over the defaults by trials</h2>\n{_plot(rows, journal)}\n"
    )


def _cells(row: Row) -> str:
    pairs = zip(TITLES, row.cells(), strict=True)
    return "".join(f"<td{_right(title)}>{html.escape(cell)}</td>" for title, cell in pairs)


def _right(title: str) -> str:
    return " class=n" if title in NUMBERS else ""


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _KEY = 660, 320, 48, 28, 36, 22


def _plot(rows: Sequence[Row], journal: Journal) -> str:
    tasks = list(dict.fromkeys(row.task.id for row in rows))
    names = {row.task.id: f"{row.task.text} {row.task.batch}" for row in rows}
    courses = [convergence([t for t in journal.trials if t.task == id_]) for id_ in tasks]
    longest = max([1, *map(len, courses)])
    highest = max([1.05, *(max(c, default=1.0) for c in courses)])
    height = _HEIGHT - _BOTTOM

    def place(trial: int, gain: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * trial / longest
        return f"{x:.1f},{height - (height - 12) * (gain - 1) / (highest - 1):.1f}"

    parts = []
    for i in range(5):
        gain = 1 + (highest - 1) * i / 4
        x, y = place(0, gain).split(",")
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end" font-size="11">{gain:.2f}x</text>'
        )
    for i in range(5):
        trial = longest * i // 4
        x = place(trial, 1).split(",")[0]
        parts.append(
            f'<text x="{x}" y="{height + 16}" text-anchor="middle" font-size="11">{trial}</text>'
        )
    for i, course in enumerate(courses):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join(place(n, g) for n, g in enumerate([1.0, *course]))
        y = _HEIGHT + _KEY * i + 10
        parts.append(
            f'<polyline points="{points}" stroke="{colour}"/>'
            f'<text x="{_LEFT}" y="{y}" fill="{colour}" font-size="12">'
            f"{html.escape(names[tasks[i]])}</text>"
        )
    total = _HEIGHT + _KEY * len(tasks)
    return f'<svg width="{_WIDTH}" height="{total}">{"".join(parts)}</svg>'
