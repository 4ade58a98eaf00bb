"""Results as text: aligned table, Markdown, CSV, JSON. Columns follow ``llama-bench``."""

from __future__ import annotations

import csv
import io
import json

from fairy_compile.bench.result import BenchResult, Comparison, Measurement
from fairy_compile.results import aligned_table, bullets, markdown_table

FORMATS = ("table", "md", "json", "csv")

_NUMBERS = {
    "size", "params", "threads", "t/s", "median", "min..max", "cores", "GB/s", "% of read",
    "calls", "us", "%", "peer size", "ours t/s", "peer t/s", "ratio", "of best",
}  # fmt: skip


def render(result: BenchResult | Comparison, form: str) -> str:
    """Return ``result`` as text in one of `FORMATS`, without a line break at the end."""
    if form == "json":
        return json.dumps(result.to_json(), indent=2, ensure_ascii=False)
    if form == "csv":
        return _csv(result)
    table = markdown_table if form == "md" else aligned_table

    def layout(titles: list[str], rows: list[list[str]]) -> str:
        return table(titles, rows, _NUMBERS)

    comparison = result if isinstance(result, Comparison) else None
    alone = comparison.result if comparison else result
    blocks = [layout(*_tests(alone)), layout(*_kernels(alone)), _facts(alone, form)]
    if comparison:
        blocks = [layout(*_pairs(comparison)), *blocks, _mixes(comparison, form)]
    return "\n\n".join(blocks)


def _tests(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    model = result.model
    titles = ["model", "size", "params", "backend", "threads", "test", "t/s"]
    titles += ["median", "min..max", "cores", "GB/s", "% of read"]
    rows = []
    for test in result.tests:
        rate = test.tokens_per_second
        rows.append(
            [
                model.name,
                _binary(model.size_bytes),
                _count(model.parameters),
                f"{model.device} ({model.target}, {model.act})",
                str(result.threads),
                test.workload.name,
                f"{rate.mean:.2f} ± {rate.stddev:.2f}",
                f"{rate.median:.2f}",
                f"{rate.low:.2f}..{rate.high:.2f}",
                f"{test.cores_busy:.2f}",
                *_bandwidth(test),
            ]
        )
    return titles, rows


def _binary(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} B" if weights >= 1e9 else f"{weights / 1e6:.2f} M"


def _bandwidth(test: Measurement) -> list[str]:
    rate, share = test.weight_bytes_per_second, test.read_share
    return [
        "-" if rate is None else f"{rate / 1e9:.2f}",
        "-" if share is None else f"{share:.0%}",
    ]


def _kernels(result: BenchResult) -> tuple[list[str], list[list[str]]]:
    titles = [f"one decode step at depth {result.kernel_depth}", "calls", "us", "%"]
    rows = [
        [k.name, str(k.calls), f"{k.seconds * 1e6:.0f}", f"{k.share:.1%}"] for k in result.kernels
    ]
    return titles, rows


def _pairs(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    titles = ["test", "peer", "peer size", "ours t/s", "peer t/s", "ratio", "of best"]
    rows = []
    for run in comparison.runs:
        for pair in run.pairs:
            rows.append(
                [
                    pair.workload.name,
                    f"llama.cpp {run.type}",
                    _binary(run.size_bytes),
                    f"{pair.ours.median:.2f} ± {pair.ours.stddev:.2f}",
                    f"{pair.peer.median:.2f} ± {pair.peer.stddev:.2f}",
                    f"{pair.ratio:.2f}x",
                    f"{pair.best_ratio:.2f}x",
                ]
            )
    return titles, rows


def _facts(result: BenchResult, form: str) -> str:
    machine = result.machine
    reads = [s for t in result.tests if t.read_bytes_per_second for s in
             t.read_bytes_per_second.samples]  # fmt: skip
    lines = [
        f"machine: {machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{machine.system}"
        + ("" if machine.load_average is None else f", load {machine.load_average:.2f} before")
    ]
    if reads:
        lines.append(
            f"plain read with the same threads, between the tests: {min(reads) / 1e9:.1f} to "
            f"{max(reads) / 1e9:.1f} GB/s; GB/s are packed weights of all linear layers, "
            f"{result.model.weight_bytes / 1e9:.3f} GB a token"
        )
    peak = result.peak_resident_bytes
    lines.append(
        f"loaded in {result.load_seconds:.1f} s"
        + ("" if peak is None else f", {peak / 1e9:.2f} GB resident at most")
        + f", prompts in chunks of {result.prefill_chunk}; cores: processor time over time"
    )
    lines.append("versions: " + ", ".join(f"{k} {v}" for k, v in result.versions.items()))
    lines.append(
        f"artifact {result.model.manifest_sha256[:16]}, {result.date}, command: {result.command}"
    )
    return bullets(lines, form)


def _mixes(comparison: Comparison, form: str) -> str:
    lines = [
        "median ± deviation of runs in turns (A B B A ...), ratio of medians and of the fastest "
        "runs; llama.cpp's files are random models "
        "of the same shape in the types of its own mixes:"
    ]
    for run in comparison.runs:
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in run.tensor_types.items())
        lines.append(f"{run.type} ({run.description}): {sizes}")
    lines += [f"{name} could not be run: {why}" for name, why in comparison.failed.items()]
    if comparison.runs:
        lines.append(f"{comparison.peer}: {comparison.runs[0].system}")
    return bullets(lines, form)


def _csv(result: BenchResult | Comparison) -> str:
    alone = result.result if isinstance(result, Comparison) else result
    runs = result.runs if isinstance(result, Comparison) else ()
    tests: list[tuple[str, int, str, object]] = [
        (alone.model.name, alone.model.size_bytes, t.workload.name, t.tokens_per_second)
        for t in alone.tests
    ]
    for run in runs:
        for pair in run.pairs:
            beside = f"{alone.model.name} beside llama.cpp {run.type}"
            tests.append((beside, alone.model.size_bytes, pair.workload.name, pair.ours))
            peer = f"llama.cpp {run.type}"
            tests.append((peer, run.size_bytes, pair.workload.name, pair.peer))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["avg_ts", "stddev_ts", "median_ts", "min_ts", "max_ts"]
    writer.writerow(["model", "model_size", "model_n_params", "n_threads", "test", *columns])
    for name, size, test, rate in tests:
        figures = [rate.mean, rate.stddev, rate.median, rate.low, rate.high]
        row = [name, size, alone.model.parameters, alone.threads, test]
        writer.writerow([*row, *(f"{figure:.6f}" for figure in figures)])
    return text.getvalue().rstrip("\n")
