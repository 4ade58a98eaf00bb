"""Results of evaluations as text: aligned table, Markdown, JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fairy_compile.evaluation.result import Comparison, EvalResult
from fairy_compile.results import aligned_table, bullets, markdown_table

if TYPE_CHECKING:
    from fairy_compile.evaluation.tasks import TaskResult

FORMATS = ("table", "md", "json")

_NUMBERS = {
    "tokens scored", "nats/token", "perplexity", "tok/s", "delta nats", "KL nats", "same top-1",
    "max logit diff", "shots", "examples", "value", "stderr",
}  # fmt: skip


def render(result: EvalResult | TaskResult, form: str) -> str:
    """Return ``result`` as text in one of `FORMATS`, without a line break at the end."""
    if form == "json":
        return json.dumps(result.to_json(), indent=2, ensure_ascii=False)
    table = markdown_table if form == "md" else aligned_table
    if not isinstance(result, EvalResult):
        titles, rows = _tasks(result)
        lines = _where(result)
        if result.limit is not None:
            lines.insert(0, f"only the first {result.limit} examples of each task were run")
        return "\n\n".join([table(titles, rows, _NUMBERS), bullets(lines, form)])
    blocks = [table(*_score(result), _NUMBERS)]
    if result.against is not None:
        blocks.append(table(*_comparison(result.against), _NUMBERS))
    blocks.append(bullets(_facts(result), form))
    return "\n\n".join(blocks)


def _score(result: EvalResult) -> tuple[list[str], list[list[str]]]:
    titles = ["model", "backend", "tokens scored", "nats/token", "perplexity", "tok/s"]
    model = result.model
    row = [
        model.name,
        f"{model.device} ({model.target}, {model.act})",
        str(result.scored),
        result.score.nats.show(4),
        result.score.show_perplexity(),
        f"{result.tokens_per_second:.1f}",
    ]
    return titles, [row]


def _comparison(found: Comparison) -> tuple[list[str], list[list[str]]]:
    titles = ["against", "nats/token", "perplexity", "delta nats", "KL nats", "same top-1"]
    titles += ["max logit diff"]
    row = [
        "the reference",
        found.score.nats.show(4),
        found.score.show_perplexity(),
        found.delta.show_small("+"),
        found.kl.show_small(),
        found.agreement.show(2, scale=100) + " %",
        f"{found.max_logit_difference:.3g}",
    ]
    return titles, [row]


def _facts(result: EvalResult) -> list[str]:
    text = result.text
    split = f", split {text.split}" if text.split else ""
    kind = (
        "disjoint windows" if result.stride == result.context else f"windows every {result.stride}"
    )
    lines = [
        f"text: {text.path}{split}, {text.tokens} tokens{', cut off' if text.truncated else ''} "
        f"(sha256 {text.tokens_sha256[:16]}); {result.windows} {kind} of "
        f"{min(result.context, text.tokens)} tokens; ± is the standard error over windows",
    ]
    if result.against is not None:
        lines.append(
            f"reference: {result.against.reference}; delta is the model less the reference, its "
            "error that of pairs; KL is KL(reference || model)"
        )
    return lines + _where(result)


def _where(result: EvalResult | TaskResult) -> list[str]:
    machine = result.machine
    return [
        f"machine: {machine.cpu}, {machine.cores} cores, {machine.system}, {result.threads} "
        f"threads; {result.seconds:.1f} s",
        "versions: " + ", ".join(f"{k} {v}" for k, v in result.versions.items()),
        f"artifact {result.model.manifest_sha256[:16]}, {result.date}, command: {result.command}",
    ]


def _tasks(result: TaskResult) -> tuple[list[str], list[list[str]]]:
    titles = ["task", "version", "shots", "examples", "metric", "value", "stderr"]
    rows = [
        [
            row.task,
            row.version,
            "-" if row.shots is None else str(row.shots),
            "-" if row.examples is None else str(row.examples),
            row.metric,
            f"{row.value:.4f}",
            "-" if row.stderr is None else f"{row.stderr:.4f}",
        ]
        for row in result.rows
    ]
    return titles, rows
