"""From logits to the next token, in NumPy on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from fairy_compile.config import is_whole
from fairy_compile.errors import FairyError, ModelFileError

GREEDY_BELOW = 1e-5
"""Temperatures below this take the likeliest token (as the MLC engine does)."""

_FEW = 1024  # that are sorted in less time than it takes to look for fewer
_BLOCK = 512  # of weights that are summed before one of them is looked at


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: divisor of the logits; below 1e-5 greedy, ties going to the lowest id.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum; 0 is
            greedy among them, 1 draws from all.
        repetition_penalty: logits of tokens already in the answer are divided by it where
            positive and multiplied by it where negative; 1 is off.
        presence_penalty: subtracted once from the logits of tokens already in the answer.
        frequency_penalty: subtracted once for each time the token is in the answer.
        logit_bias: token id -> number added to its logit.
        seed: the same seed, model and prompt give the same text; None draws a new seed.

    Raises:
        FairyError: a value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not isinstance(self.logit_bias, Mapping):
            raise FairyError(
                f"logit_bias is {self.logit_bias!r}; allowed: a dictionary of tokens and numbers, "
                "such as {5: 1.0}"
            )
        for token, bias in self.logit_bias.items():
            if not is_whole(token):
                raise FairyError(f"logit_bias names the token {token!r}; allowed: integers")
            _check(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.seed is not None and (not is_whole(self.seed) or self.seed < 0):
            raise FairyError(f"seed is {self.seed!r}; allowed: an integer from 0, or None")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """Return the defaults that mlc-chat-config.json names; what it leaves out is off."""
        names = {f.name for f in fields(cls)} - {"seed", "logit_bias"}
        given = {name: config[name] for name in names if config.get(name) is not None}
        return cls(**given)

    def override(self, **changes: Any) -> SamplingParams:
        """Return a copy with the changes that are not None."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})


def _check(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise FairyError(f"{name} is {value!r}; allowed: {low:g} to {high:g}")


class Sampler:
    """Draws the tokens of one answer; remembers them for the penalties.

    Penalties follow the library function `apply_penalty_inplace` of the MLC contract, and like
    that engine count the tokens of the answer, not those of the prompt.
    """

    def __init__(self, params: SamplingParams):
        self.params = params
        self._counts: dict[int, int] = {}
        self._rng = np.random.default_rng(params.seed)

    def sample(self, logits: np.ndarray) -> int:
        """Return the next token for ``logits``, float32 [vocab], and count it.

        Raises:
            ModelFileError: the logits are NaN or infinite.
            FairyError: ``logit_bias`` names a token outside the vocabulary.
        """
        scores = self.adjust(logits)
        params = self.params
        if params.temperature < GREEDY_BELOW or params.top_p == 0:
            token = int(np.argmax(scores))
        else:
            token = self._draw(scores)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Return float32 [vocab]: the logits with bias and penalties, in the engine's order."""
        params = self.params
        top = float(logits.max())  # NaN if any is
        if not math.isfinite(top):
            raise ModelFileError(
                f"the model returned the logit {top}; its weights or its library are damaged: "
                "build it again"
            )
        if not params.logit_bias and not (self._counts and self._penalised()):
            return np.asarray(logits, np.float32)
        scores = np.array(logits, np.float32)
        for token, bias in params.logit_bias.items():
            if not 0 <= token < len(scores):
                raise FairyError(f"logit_bias names token {token}; allowed: 0 to {len(scores) - 1}")
            scores[token] += np.float32(bias)
        if self._counts and self._penalised():
            ids = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            values = scores[ids]
            values -= np.float32(params.presence_penalty)
            values -= counts * np.float32(params.frequency_penalty)
            penalty = np.float32(params.repetition_penalty)
            scores[ids] = np.where(values < 0, values * penalty, values / penalty)
        return scores

    def _penalised(self) -> bool:
        p = self.params
        return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)

    def _draw(self, scores: np.ndarray) -> int:
        weights = scores - scores.max()
        weights /= np.float32(self.params.temperature)
        np.exp(weights, out=weights)
        if self.params.top_p >= 1:
            return _pick(weights, self._rng.random())
        ids = nucleus(weights, self.params.top_p)
        return int(ids[_pick(weights[ids], self._rng.random())])


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the fewest token ids, heaviest first, whose weights reach the share ``top_p`` of all.

    Equal weights are ordered by id.
    """
    # Sorting a vocabulary of 100000 costs more than a small model's step.
    total = float(weights.sum(dtype=np.float64))
    # All lighter ones together weigh less than what may be missing, even if sums are rounded.
    lightest = 0.999 * (1 - top_p) * total / len(weights)
    ids = np.flatnonzero(weights >= lightest)
    if len(ids) > _FEW:
        ids = ids[_heaviest(weights[ids], top_p * total)]
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    reached = np.searchsorted(np.cumsum(weights[ids], dtype=np.float64), top_p * total)
    return ids[: reached + 1]


def _heaviest(weights: np.ndarray, wanted: float) -> np.ndarray:
    """Return the places of the heaviest weights that reach ``wanted``, and of few more.

    Weights are counted by their first 16 bits as float32, which are ordered as they are.
    """
    kinds = weights.astype(np.float32).view(np.int32) >> 16
    kinds -= kinds.min()
    of_kind = np.bincount(kinds, weights)
    reached = np.searchsorted(np.cumsum(of_kind[::-1]), wanted * (1 + 1e-9))
    return np.flatnonzero(kinds >= len(of_kind) - 1 - reached)


def _pick(weights: np.ndarray, uniform: float) -> int:
    """Return the index whose share of the cumulated weights holds ``uniform`` of [0, 1)."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    ends = np.cumsum(blocks)
    target = uniform * ends[-1]
    block = _first_beyond(ends, blocks, target)
    before = ends[block - 1] if block else 0.0
    own = weights[block * _BLOCK : (block + 1) * _BLOCK]
    cumulated = before + np.cumsum(own, dtype=np.float64)
    return block * _BLOCK + _first_beyond(cumulated, own, target)


def _first_beyond(cumulated: np.ndarray, weights: np.ndarray, target: float) -> int:
    """Return the first place whose sum is beyond ``target``, whatever sums are rounded to.

    That is never one without weight, which is how tokens are ruled out.
    """
    index = int(np.searchsorted(cumulated, target, side="right"))
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])
