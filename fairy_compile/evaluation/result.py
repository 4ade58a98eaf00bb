"""What an evaluation found: plain data, printed by `evaluation.tables` and saved as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fairy_compile.bench.result import RunFacts
from fairy_compile.evaluation.estimate import Estimate
from fairy_compile.evaluation.text import TextFacts


@dataclass(frozen=True)
class Score:
    """How well a model predicts the text.

    Attributes:
        nats: -log p a token.
    """

    nats: Estimate

    @property
    def perplexity(self) -> float:
        """exp(nats), infinite where that is beyond float64."""
        return math.exp(self.nats.mean) if self.nats.mean < 700 else math.inf

    @property
    def perplexity_stderr(self) -> float | None:
        """Its standard error to first order; None for a single window."""
        return None if self.nats.stderr is None else self.perplexity * self.nats.stderr

    def show_perplexity(self) -> str:
        """Return ``perplexity ± stderr``."""
        return Estimate(self.perplexity, self.perplexity_stderr).show(3)

    def to_json(self) -> dict[str, Any]:
        """Return both figures with their errors."""
        return {
            "nats_per_token": self.nats.to_json(),
            "perplexity": {"mean": self.perplexity, "stderr": self.perplexity_stderr},
        }


@dataclass(frozen=True)
class Comparison:
    """A model against a reference, on the same windows.

    Attributes:
        reference: what it is and how it was computed.
        score: the reference's own.
        delta: nats a token of the model less those of the reference; errors of pairs.
        kl: KL(reference || model) in nats, the mean over positions.
        agreement: share of positions whose likeliest token is the same.
        max_logit_difference: greatest absolute difference of two logits.
    """

    reference: str
    score: Score
    delta: Estimate
    kl: Estimate
    agreement: Estimate
    max_logit_difference: float


@dataclass(frozen=True)
class EvalResult(RunFacts):
    """One artifact on one text.

    Attributes, beside those of `RunFacts`:
        text: what it was evaluated on.
        context: tokens of a window.
        stride: tokens from one window to the next.
        windows: how many.
        scored: tokens scored in all of them.
        score: the model's.
        seconds: wall-clock time of everything after loading.
        tokens_per_second: tokens through the model over the time it computed.
        against: comparison with a reference, if one was asked for.
    """

    text: TextFacts
    context: int
    stride: int
    windows: int
    scored: int
    score: Score
    seconds: float
    tokens_per_second: float
    against: Comparison | None = None

    @property
    def nats(self) -> float:
        """Mean -log p a token."""
        return self.score.nats.mean

    @property
    def perplexity(self) -> float:
        """exp of it."""
        return self.score.perplexity
