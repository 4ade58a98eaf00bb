"""Tables and a plot of a quality study.

    python benchmarks/quality/table.py WORK [--plot quality.png]

Gaps are means over seeds, with the standard deviation between seeds. Conversions without training
are compared with the floating-point model they were made from, trained models with the control,
which saw the same further text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

TITLES = {
    "free-w1-plain": "W1, published rule",
    "free-w1-gptq": "W1, calibrated (published rule's codes)",
    "free-ternary": "ternary (absmean)",
    "free-w2-plain": "**W2, published rule**",
    "free-w2-alternating": "W2, alternating",
    "free-w2-gptq": "**W2, calibrated**",
    "free-w2-gptq-head3": "**W2, calibrated, head T = 3** (what `--calibrate` does)",
    "free-w2-gptq-head3-rotated": "W2, calibrated, head T = 3, `--rotate`",
    "free-w2-gptq-head3-tuned": "W2, calibrated, head T = 3, scales per row, `--tune 60`",
    "free-rtn2-g32": "2 bits rounded to nearest, groups of 32",
    "free-auto-round-g32": "auto-round, 2 bits, groups of 32",
    "free-auto-round-g32-sym": "auto-round, 2 bits, groups of 32, symmetric",
    "free-auto-round-g32-sym-ext": "auto-round, 2 bits, groups of 32, symmetric, `enable_alg_ext`",
    "free-auto-round-g128": "auto-round, 2 bits, groups of 128",
    "free-auto-round-g32-float-head": "auto-round, 2 bits, groups of 32, head left in float16",
    "free-rtn3-g32": "3 bits rounded to nearest, groups of 32",
    "free-rtn4-g32": "4 bits rounded to nearest, groups of 32",
    "free-w3-gptq": "W3, calibrated",
    "qat-sign": "sign and mean (1-bit)",
    "qat-w1": "**W1**",
    "qat-ternary": "ternary (absmean)",
    "qat-w2": "**W2**",
    "qat-w2-head3": "W2, head T = 3",
    "qat-w2-row": "W2, scales per row",
    "qat-w2-long": "W2, three times the tokens, the control as well",
}
BASES = {"qat-w2-long": "control-long"}  # what a run is compared with, where not with the control
SEARCH = {
    "base": "rate 1e-3, warm-up 20 steps",
    "lr-2e-3": "rate 2e-3",
    "lr-4e-3": "rate 4e-3",
    "lr-5e-4": "rate 5e-4",
    "distil": "all of the loss distilled",
    "distil-half": "half of the loss distilled",
    "distil-lr-2e-3": "all of the loss distilled, rate 2e-3",
    "distil-lr-4e-3": "all of the loss distilled, rate 4e-3",
    "warmup-200": "warm-up 200 steps",
    "others-third": "a third of the rate for embedding and norms",
    "batch-16": "half the batch, twice the steps",
    "decay": "weight decay .05",
    "alternating": "begun from fitted codes and scales",
    "row": "scales per row (more bits)",
    "control": "control, rate 1e-3",
    "control-lr-2e-3": "control, rate 2e-3",
    "control-lr-5e-4": "control, rate 5e-4",
    "control-distil": "control, half of the loss distilled",
}

# Labels that would lie over others: points above the usual place.
OFFSETS = {"free-w1-gptq": 7, "free-w2-gptq-head3-rotated": -8, "qat-sign": 5, "qat-w1": -3}


class Results:
    """The finished runs of a study: loss, nats a token, and bits a weight."""

    def __init__(self, work: Path) -> None:
        self.runs: dict[str, dict[int, dict]] = {}
        for path in sorted(work.glob("seed-*/*.json")):
            run = json.loads(path.read_text())
            if "run" in run:
                self.runs.setdefault(run["run"], {})[run["seed"]] = run

    def losses(self, name: str) -> list[float]:
        """Return the losses of a run, by seed."""
        return [run["loss"] for _, run in sorted(self.runs[name].items())]

    def gaps(self, name: str, base: str) -> list[float]:
        """Return what a run loses against another, for every seed that has both."""
        both = sorted(self.runs[name].keys() & self.runs[base].keys())
        return [self.runs[name][seed]["loss"] - self.runs[base][seed]["loss"] for seed in both]

    def ratios(self, name: str, other: str, base: str) -> list[float]:
        """Return the gap of a run as a share of another's, for every seed."""
        runs = [self.runs[which] for which in (name, other, base)]
        seeds = sorted(set.intersection(*(set(run) for run in runs)))
        losses = ([run[seed]["loss"] for run in runs] for seed in seeds)
        return [(mine - least) / (theirs - least) for mine, theirs, least in losses]

    def bits(self, name: str) -> float:
        """Return the stored bits a weight of the linear layers."""
        return statistics.mean(run["bits"] for run in self.runs[name].values())


def spread(values: list[float], digits: int = 3) -> str:
    """Return "mean +- standard deviation"."""
    words = f"{statistics.mean(values):.{digits}f}"
    return f"{words} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else words


def table(results: Results, prefix: str, base: str) -> list[str]:
    """Return the Markdown lines of one kind of run."""
    plain = "free-w2-plain"
    free = prefix == "free-"
    last = " | share of the published rule's |" if free else " | perplexity / the control's |"
    lines = [f"| | bits a weight | loss gap, nats{last}", "|---|---|---|---|"]
    for name, title in TITLES.items():
        if not name.startswith(prefix) or name not in results.runs:
            continue
        if BASES.get(name, base) not in results.runs:
            continue
        gaps = results.gaps(name, BASES.get(name, base))
        if free:
            more = f"{100 * statistics.mean(results.ratios(name, plain, base)):.0f} %"
        else:
            more = spread([math.exp(gap) for gap in gaps])
        if len(gaps) < len(results.runs[base]):
            title += f" ({len(gaps)} of {len(results.runs[base])} seeds)"
        lines.append(f"| {title} | {results.bits(name):.2f} | {spread(gaps)} | {more} |")
    return lines


def search_table(results: Results) -> list[str]:
    """Return the Markdown lines of the search for settings; see `runs.SEARCH`."""
    losses = {
        key: results.losses(f"search-{key}")[0] for key in SEARCH if f"search-{key}" in results.runs
    }
    controls = [loss for key, loss in losses.items() if key.startswith("control")]
    if not controls:
        return []
    lines = ["| settings | loss, nats | perplexity / the best control's |", "|---|---|---|"]
    for key, loss in losses.items():
        ratio = math.exp(loss - min(controls))
        lines.append(f"| {SEARCH[key]} | {loss:.4f} | {ratio:.3f} |")
    return lines


def plot(results: Results, path: Path) -> None:
    """Draw loss gaps over bits a weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sides = [("free-", "fp", "without training"), ("qat-", "control", "trained for its codes")]
    sides = [side for side in sides if any(name.startswith(side[0]) for name in results.runs)]
    size = (5.5 * len(sides), 4.5)
    figure, axes = pyplot.subplots(1, len(sides), figsize=size, sharey=True, squeeze=False)
    for axis, (prefix, base, words) in zip(axes[0], sides, strict=True):
        names = [n for n in TITLES if n.startswith(prefix) and n in results.runs]
        for name in (n for n in names if BASES.get(n, base) in results.runs):
            gaps, bits = results.gaps(name, BASES.get(name, base)), results.bits(name)
            label = TITLES[name].replace("*", "").split(" (")[0].replace("`", "")
            colour = "tab:blue" if label.startswith("W") else "tab:gray"
            axis.plot([bits] * len(gaps), gaps, "o", color=colour, markersize=4)
            place = (6, OFFSETS.get(name, 2))
            axis.annotate(label, (bits, statistics.mean(gaps)), place, fontsize=7,
                          textcoords="offset points", color=colour)  # fmt: skip
        axis.set(title=words, xlabel="bits a weight", yscale="log")
        axis.set_xlim(0.5, 8.5 if prefix == "free-" else 3.5)
        axis.margins(y=0.1)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss gap, nats a token")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    results = Results(args.work)
    fp = results.losses("fp")
    perplexity = math.exp(statistics.mean(fp))
    print(f"Floating point: loss {spread(fp)} nats (perplexity {perplexity:.1f})")
    if "control" in results.runs:
        gains = [-gap for gap in results.gaps("control", "fp")]
        share = statistics.mean(gain / loss for gain, loss in zip(gains, fp, strict=False))
        print(f"Control: loss {spread(results.losses('control'))}; the further tokens ", end="")
        print(f"gain {spread(gains)} nats ({100 * share:.1f} % of the loss)")
    print()
    if "free-w2-plain" in results.runs:
        print("\n".join(table(results, "free-", "fp")), end="\n\n")
    if "control" in results.runs:
        print("\n".join(table(results, "qat-", "control")), end="\n\n")
    print("\n".join(search_table(results)))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
