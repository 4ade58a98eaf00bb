"""What `gpu.py` shows: JSON, a Markdown table and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COLUMNS = ("call", "T", "rows of x", "error", "phase us", "GB/s", "of copy", "dense us",
            "cuBLAS us", "x dense", "x cuBLAS", "TFLOP/s", "of cuBLAS'")  # fmt: skip


def head(results: dict[str, Any]) -> str:
    """Return the lines before the rows."""
    lines = [
        f"{results['device']}, torch {results['torch']}, kernel {results['kernel']}, copies "
        f"{results['copy_gb_per_s']:.0f} GB/s\n",
        f"| {' | '.join(_COLUMNS)} |",
        "|" + "---|" * len(_COLUMNS),
    ]
    return "\n".join(lines)


def print_head(results: dict[str, Any]) -> None:
    """Print the lines before the rows."""
    print(head(results), flush=True)


def print_row(results: dict[str, Any], row: dict[str, Any]) -> None:
    """Print a row."""
    print(_line(results, row), flush=True)


def _line(results: dict[str, Any], row: dict[str, Any]) -> str:
    phase, dense, cublas = row["phase"], row["dense"], row["cublas"]
    rate = phase["bytes"] / phase["us"] / 1e3
    flops = 2 * row["batch"] * (dense["bytes"] / 2) / phase["us"] / 1e6
    share = "in L2" if phase["fits_l2"] else f"{rate / results['copy_gb_per_s']:.0%}"
    cells = (
        row["call"], row["stages"], _rows(row), f"{phase['error']:.1e}",
        f"{phase['us']:.1f} ({phase['low_us']:.1f}-{phase['high_us']:.1f})", f"{rate:.0f}", share,
        f"{dense['us']:.1f}", f"{cublas['us']:.1f}", f"{dense['us'] / phase['us']:.2f}",
        f"{cublas['us'] / phase['us']:.2f}", f"{flops:.0f}",
        f"{cublas['us'] / phase['us']:.0%}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _rows(row: dict[str, Any]) -> str:
    return f"{row['batch']}, integers" if row.get("image") else str(row["batch"])


def write_json(results: dict[str, Any], path: Path) -> None:
    """Write what was measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(results, indent=1), "utf-8")
    partial.replace(path.with_suffix(".json"))


def write(results: dict[str, Any], path: Path) -> None:
    """Write PATH.json, PATH.md and, where matplotlib is installed, PATH.png."""
    write_json(results, path)
    lines = [head(results), *(_line(results, row) for row in results["rows"])]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    try:
        plot(results, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw speedups over cuBLAS against rows of x, a line for every call and T.

    A circle without a line is a row that comes as integers.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = sorted({row["stages"] for row in results["rows"]}, reverse=True)
    figure, axes = plt.subplots(1, len(stages), figsize=(6 * len(stages), 4.5), sharey=True)
    for axis, count in zip(axes if len(stages) > 1 else [axes], stages, strict=True):
        rows = [row for row in results["rows"] if row["stages"] == count]
        for call in dict.fromkeys(row["call"] for row in rows):
            own = [row for row in rows if row["call"] == call and not row.get("image")]
            speedups = [row["cublas"]["us"] / row["phase"]["us"] for row in own]
            (line,) = axis.plot([row["batch"] for row in own], speedups, marker="o", label=call)
            given = [row for row in rows if row["call"] == call and row.get("image")]
            axis.plot(
                [row["batch"] for row in given],
                [row["cublas"]["us"] / row["phase"]["us"] for row in given],
                linestyle="none", marker="o", markerfacecolor="none", color=line.get_color(),
            )  # fmt: skip
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="rows of x", title=f"T = {count}")
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        batches = sorted({row["batch"] for row in rows})
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("speed / cuBLAS float16")
    figure.axes[-1].legend(fontsize=8)
    figure.suptitle(f"Phase GEMM on {results['device']}, {results['kernel']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
