"""Scores of one window: from logits to sums over its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.evaluation.models import LogitSource
from fairy_compile.evaluation.windows import Window

# Logits of a piece take 128 MiB a model at most, and float64 work on them 16 MiB an array.
_PIECE_LOGITS = 1 << 25
_BLOCK_LOGITS = 1 << 21


@dataclass
class WindowSums:
    """Sums over the scored tokens of a window.

    Attributes:
        count: scored tokens.
        nats: -log p of the tokens.
        reference_nats: the same of the reference.
        kl: KL(reference || model).
        agreed: positions whose likeliest token is the same.
        max_difference: greatest absolute difference of two logits.
    """

    count: int = 0
    nats: float = 0.0
    reference_nats: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    max_difference: float = 0.0


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64: (rows, vocab) -> (rows, vocab)."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def score_window(
    tokens: np.ndarray, window: Window, model: LogitSource, reference: LogitSource | None = None
) -> WindowSums:
    """Run a window through the models and sum up.

    Args:
        tokens: int32, the whole text.
        window: which part of it.
        model: the model to score.
        reference: a model to compare it with.

    Raises:
        FairyError: logits are not finite.
    """
    ids = tokens[window.start : window.end - 1]  # nothing is asked of the last token
    first = window.first - 1 - window.start
    targets = tokens[window.first : window.end]
    rows = max(1, _PIECE_LOGITS // model.vocab_size)
    pieces = model.logits(ids, first, rows)
    others = reference.logits(ids, first, rows) if reference is not None else _nothing()
    sums = WindowSums()
    for piece, other in zip(pieces, others, strict=reference is not None):
        step = max(1, _BLOCK_LOGITS // model.vocab_size)
        for start in range(0, len(piece), step):
            part = slice(start, start + step)
            block = piece[part]
            wanted = targets[sums.count : sums.count + len(block)]
            _add(sums, block, wanted, None if other is None else other[part])
    if not np.isfinite([sums.nats, sums.reference_nats, sums.kl]).all():
        raise FairyError(
            f"the logits of tokens {window.start} to {window.end} are not finite; check the model "
            "with `fairy_compile verify`, or build it with --act float"
        )
    return sums


def _nothing() -> Iterator[None]:
    while True:
        yield None


def _add(
    sums: WindowSums, logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None
) -> None:
    at = np.arange(len(targets)), targets
    log_p = log_softmax(logits)
    sums.count += len(targets)
    sums.nats -= float(log_p[at].sum())
    if reference is None:
        return
    log_q = log_softmax(reference)
    sums.reference_nats -= float(log_q[at].sum())
    sums.agreed += int((logits.argmax(axis=1) == reference.argmax(axis=1)).sum())
    difference = np.abs(logits - reference).max()
    sums.max_difference = float(np.maximum(sums.max_difference, difference))
    p = np.exp(log_q)
    log_q -= log_p
    sums.kl += float(np.vdot(p, log_q))
