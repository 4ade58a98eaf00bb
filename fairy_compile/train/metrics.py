"""What a run leaves to look at: metrics.csv, TensorBoard events where installed, loss.png."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "seconds",
)
CSV, PLOT, EVENTS = "metrics.csv", "loss.png", "tensorboard"


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Return the rows of a metrics.csv; None where a column is empty, ``[]`` for no file.

    Raises:
        FairyError: it holds something else.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{k: float(v) if v else None for k, v in row.items() if k in COLUMNS}
                    for row in csv.DictReader(file)]  # fmt: skip
    except (ValueError, csv.Error) as error:
        raise FairyError(
            f"{path} is damaged: {error}; remove it, which loses only its rows"
        ) from error


class MetricsLog:
    """Writes rows to metrics.csv and, where tensorboard is installed, to its event files.

    Args:
        directory: of the run.
        resume_step: rows after this step are dropped: steps that a killed run did after its last
            checkpoint are done again.
    """

    def __init__(self, directory: Path, resume_step: int = 0):
        self.path = directory / CSV
        kept = [row for row in read_metrics(self.path) if (row["step"] or 0) <= resume_step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in kept:
                writer.writerow({k: _number(v) for k, v in row.items() if v is not None})
        partial.replace(self.path)
        self.seconds = max((row["seconds"] or 0.0 for row in kept), default=0.0)
        self._events = _event_writer(directory / EVENTS, resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; keys are among `COLUMNS`."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            values = {key: _number(row[key]) for key in COLUMNS if row.get(key) is not None}
            csv.DictWriter(file, COLUMNS).writerow(values)
        if self._events is not None:
            for key, value in row.items():
                if key not in ("step", "tokens", "seconds") and value is not None:
                    self._events.add_scalar(key, value, int(row["step"]))
            self._events.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            self._events.close()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{float(value):.9g}"


def _event_writer(directory: Path, step: int) -> Any:
    """Return a TensorBoard writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1)


def plot_losses(rows: list[dict[str, float | None]], path: Path, title: str) -> bool:
    """Write a PNG of training and evaluation loss over steps; False without matplotlib or rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = False
    for key, label, style in (
        ("loss", "training", {"color": "#7aa6c2", "linewidth": 1.2}),
        ("eval_loss", "evaluation", {"color": "#1b6ca8", "marker": "o", "markersize": 4}),
    ):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
            drawn = True
    if not drawn:
        return False
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True
