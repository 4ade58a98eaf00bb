"""The comparison as a picture."""

from __future__ import annotations

from pathlib import Path

from fairy_compile.artifact.files import human_bytes
from fairy_compile.bench.result import Comparison

_OURS, _PEER = "#1b6ca8", "#c2c7cc"
_INK = {"ours": "white", "peer": "black"}


def plot(comparison: Comparison, path: Path) -> None:
    """Write a PNG: one panel a test, for every peer type our bar and its bar from the same minutes.

    Bars are medians, lines reach from the slowest to the fastest run, ratios stand above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = comparison.runs
    names = [pair.workload.name for pair in runs[0].pairs]
    figure = Figure(figsize=(1.2 + 1.5 * len(runs) * len(names), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for index, (name, axes) in enumerate(zip(names, panels, strict=True)):
        pairs = [run.pairs[index] for run in runs]
        for side, shift, colour in (("ours", -0.2, _OURS), ("peer", 0.2, _PEER)):
            spreads = [getattr(pair, side) for pair in pairs]
            medians = [s.median for s in spreads]
            errors = [
                [s.median - s.low for s in spreads],
                [s.high - s.median for s in spreads],
            ]
            label = "fairy_compile" if side == "ours" else "llama.cpp"
            places = [i + shift for i in range(len(pairs))]
            axes.bar(places, medians, 0.38, yerr=errors, color=colour, label=label, capsize=3)
            for place, median in zip(places, medians, strict=True):
                axes.annotate(
                    _figure(median),
                    (place, 0),
                    (0, 4),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    color=_INK[side],
                )
        for place, pair in enumerate(pairs):
            height = max(pair.ours.high, pair.peer.high)
            axes.annotate(f"{pair.ratio:.2f}x", (place, height), (0, 4),
                          textcoords="offset points", ha="center", weight="bold")  # fmt: skip
        sizes = [f"{run.type}\n{human_bytes(run.size_bytes)}" for run in runs]
        axes.set_xticks(range(len(pairs)), sizes)
        axes.set_title(f"{name}, tokens a second")
        axes.set_ylim(0, 1.15 * max(max(p.ours.high, p.peer.high) for p in pairs))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    result = comparison.result
    figure.suptitle(
        f"{result.model.name} ({human_bytes(result.model.size_bytes)}) beside llama.cpp\n"
        f"{result.machine.cpu}, {result.threads} threads",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
