"""`evaluate`: perplexity of an artifact on a text, alone or against another model."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing, nullcontext
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from fairy_compile.artifact.manifest import MANIFEST, Manifest
from fairy_compile.bench.machine import PACKAGES, Machine, versions
from fairy_compile.bench.run import model_facts
from fairy_compile.errors import FairyError
from fairy_compile.evaluation.estimate import Estimate
from fairy_compile.evaluation.models import CompiledModel, LogitSource, prefix_of, tokenizer_of
from fairy_compile.evaluation.result import Comparison, EvalResult, Score
from fairy_compile.evaluation.scores import WindowSums, score_window
from fairy_compile.evaluation.text import DEFAULT_JOIN, read_text
from fairy_compile.evaluation.windows import choose_windows, cut_windows
from fairy_compile.frontends.source import ModelSource, open_source
from fairy_compile.paths import as_path
from fairy_compile.results import Progress, no_progress


def evaluate(
    directory: Path | str,
    data: Path | str,
    *,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    against: Path | str | None = None,
    text_field: str = "text",
    split: str | None = None,
    join: str = DEFAULT_JOIN,
    device: str | None = None,
    against_device: str | None = None,
    threads: int | None = None,
    cpus: Collection[int] | None = None,
    command: str = "fairy_compile.evaluate",
    progress: Progress = no_progress,
) -> EvalResult:
    """Score every token of a text; see `evaluation.windows` for what is scored.

    Args:
        directory: what ``fairy_compile build`` wrote.
        data: a text, jsonl or parquet file, a directory of them, or a saved dataset.
        context: tokens of a window; default the model's context, at most 2048.
        stride: tokens from one window to the next; default ``context``: disjoint windows.
        max_tokens: most tokens of the text to use; default all.
        against: a reference to compare with: another artifact, or a Hugging Face directory or
            packed checkpoint, which PyTorch runs in float32 (extra ``train``).
        text_field: key or column of the text in jsonl and parquet files.
        split: ``test``, ``validation`` or ``train`` of a data set that has several.
        join: text between documents.
        device: TVM device; default the one the artifact was built for.
        against_device: PyTorch device of a reference that PyTorch runs; default ``cpu``.
        threads: CPU threads; default one a physical core.
        cpus: numbers of the CPUs they may run on; default all this process may.
        command: recorded in the result.
        progress: called as progress(what, done, total).

    Raises:
        FairyError: an argument is out of range, the text is empty or cannot be read, or tokenizers
            differ; and see `fairy_compile.load`.
    """
    directory = as_path("the artifact", directory)
    machine = Machine.here()  # the load average before our own work
    manifest = Manifest.load(directory)
    manifest.check_language_model(directory)
    other = None if against is None else _open_reference(against, directory)
    if against_device is not None and (other is None or isinstance(other, Manifest)):
        raise FairyError(
            f"--against-device {against_device} goes with --against and a model that PyTorch runs"
            f"{f', and {against} is an artifact' if other else ''}; leave it out"
        )
    longest = _context(manifest)
    if isinstance(other, Manifest):
        longest = min(longest, _context(other))
    elif other is not None:
        positions = other.config.get("max_position_embeddings")
        longest = min(longest, positions) if isinstance(positions, int) else longest
    context, stride = choose_windows(context, stride, longest)
    tokens, text = read_text(
        data,
        tokenizer_of(directory),
        prefix_of(directory),
        field=text_field,
        split=split,
        join=join,
        max_tokens=max_tokens,
    )
    windows = cut_windows(len(tokens), context, stride)
    running = {"context": context, "threads": threads, "cpus": cpus}
    with closing(CompiledModel(directory, manifest, device=device, **running)) as model:
        if other is None:
            opened: object = nullcontext()
        elif isinstance(other, Manifest):
            place = as_path("the reference", against)
            opened = closing(CompiledModel(place, other, device=device, **running))
        else:
            from fairy_compile.evaluation.torch_model import TorchModel

            opened = closing(TorchModel(other, against_device or "cpu", threads))
        with opened as reference:
            if reference is not None and reference.vocab_size != model.vocab_size:
                raise FairyError(
                    f"{directory} has logits of {model.vocab_size} tokens, {against} of "
                    f"{reference.vocab_size}; only models of one vocabulary can be compared"
                )
            started = time.perf_counter()
            sums = _score(tokens, windows, model, reference, progress)
            seconds = time.perf_counter() - started
            description = None if reference is None else reference.description
        counts = _column(sums, "count")
        return EvalResult(
            model=model_facts(directory, manifest, str(model.model.engine.device)),
            machine=machine,
            versions=versions(PACKAGES + (("torch", "transformers") if against else ())),
            command=command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            threads=model.model.engine.threads,
            text=text,
            context=context,
            stride=stride,
            windows=len(windows),
            scored=int(counts.sum()),
            score=Score(Estimate.of(_column(sums, "nats"), counts)),
            seconds=seconds,
            tokens_per_second=model.fed / model.seconds,
            against=None if description is None else _compare(description, sums, counts),
        )


def _open_reference(against: Path | str, directory: Path) -> Manifest | ModelSource:
    """Return the manifest or the source of a reference whose tokenizer is the artifact's."""
    path = as_path("the reference", against)
    other: Manifest | ModelSource
    if (path / MANIFEST).is_file():
        other, place = Manifest.load(path), path
    else:
        from fairy_compile.evaluation.torch_model import check_extra

        if path.is_dir() and not (path / "config.json").is_file():
            raise FairyError(
                f"--against {path} has neither {MANIFEST} nor config.json; give an artifact, a "
                "Hugging Face directory or a packed checkpoint"
            )
        check_extra()
        other = open_source(against)
        place = other.directory
    ours, theirs = tokenizer_of(directory).vocabulary(), tokenizer_of(place).vocabulary()
    if ours != theirs:
        raise FairyError(
            f"the tokenizers of {directory} and {place} differ ({len(ours)} and {len(theirs)} "
            "tokens); only models of one vocabulary can be compared"
        )
    return other


def _context(manifest: Manifest) -> int:
    return int(manifest.metadata["context_window_size"])


def _score(tokens, windows, model: LogitSource, reference, progress: Progress) -> list[WindowSums]:
    sums: list[WindowSums] = []
    total = count = 0.0
    progress("windows", 0, len(windows))
    for done, window in enumerate(windows, 1):
        sums.append(score_window(tokens, window, model, reference))
        total, count = total + sums[-1].nats, count + sums[-1].count
        progress(f"windows, {total / count:.4f} nats/token so far", done, len(windows))
    return sums


def _column(sums: list[WindowSums], name: str) -> np.ndarray:
    return np.array([getattr(entry, name) for entry in sums], np.float64)


def _compare(reference: str, sums: list[WindowSums], counts: np.ndarray) -> Comparison:
    own, others = _column(sums, "nats"), _column(sums, "reference_nats")
    return Comparison(
        reference=reference,
        score=Score(Estimate.of(others, counts)),
        delta=Estimate.of(own - others, counts),
        kl=Estimate.of(_column(sums, "kl"), counts),
        agreement=Estimate.of(_column(sums, "agreed"), counts),
        max_logit_difference=float(_column(sums, "max_difference").max()),
    )
