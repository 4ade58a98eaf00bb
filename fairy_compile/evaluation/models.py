"""`LogitSource`: what the evaluation asks of a model, and how compiled models give it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from fairy_compile.artifact.manifest import Manifest
from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.runtime import load_language_model
from fairy_compile.runtime.text import Tokenizer


class LogitSource(Protocol):
    """A model ready to run.

    Attributes:
        description: what it is and how it computes, for people.
        vocab_size: width of its logits.
        fed: tokens that went through the model.
        seconds: how long that took.
    """

    description: str
    vocab_size: int

    @property
    def fed(self) -> int: ...  # noqa: D102

    @property
    def seconds(self) -> float: ...  # noqa: D102

    def logits(self, tokens: np.ndarray, first: int, rows: int) -> Iterator[np.ndarray]:
        """Run a new sequence; yield the logits after ``tokens[first]``, ``tokens[first + 1]`` ...

        Args:
            tokens: int32 (length,).
            first: tokens before it are context only.
            rows: positions a piece; only the last piece may have fewer.

        Yields:
            float32 (rows, vocab_size).
        """

    def close(self) -> None:
        """Free its memory."""


class CompiledModel:
    """A `LogitSource` over an artifact."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        context: int,
        device: str | None = None,
        threads: int | None = None,
        cpus: Collection[int] | None = None,
    ):
        """Load an artifact for sequences of ``context`` tokens; see `fairy_compile.load`."""
        self.model = load_language_model(
            directory, device, threads=threads, cpus=cpus, max_sequences=1, context=context
        )
        engine = self.model.engine
        self.vocab_size = engine.vocab_size
        self.description = (
            f"{directory}: {manifest.source.name} {manifest.quant['quant']}, activations "
            f"{manifest.quant['act']}, target {manifest.target.name}, on {engine.device}"
        )

    @property
    def fed(self) -> int:
        """Tokens that went through the model."""
        return self.model.engine.prefill_phase.tokens

    @property
    def seconds(self) -> float:
        """How long they took."""
        return self.model.engine.prefill_phase.seconds

    def logits(self, tokens: np.ndarray, first: int, rows: int) -> Iterator[np.ndarray]:
        """See `LogitSource`. Of context, the output head computes one row a chunk."""
        engine = self.model.engine
        sequence = engine.add_sequence()
        try:
            if first:
                engine.prefill(sequence, tokens[:first])
            for start in range(first, len(tokens), rows):
                yield engine.prefill_logits(sequence, tokens[start : start + rows])
        finally:
            engine.remove_sequence(sequence)

    def close(self) -> None:
        """Free its memory."""
        self.model.close()


def prefix_of(directory: Path) -> list[int]:
    """Return the tokens the tokenizer in ``directory`` puts before every text."""
    return TokenizerFiles.read(directory).prefix_ids()


def tokenizer_of(directory: Path) -> Tokenizer:
    """Return the tokenizer of a model directory."""
    return Tokenizer(directory / "tokenizer.json")
