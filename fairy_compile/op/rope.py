"""Rotary position embedding: which angle a pair of elements turns by, for every published rule.

Pair i of a head at position p turns by p * frequency[i] (Su et al., arXiv 2104.09864); cos and sin
are multiplied by an amplitude, which is 1 but for yarn and longrope. Where only the first
``rotary_dim`` elements of a head turn, element i pairs with i + rotary_dim / 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RopeTable:
    """Angles of a model's heads.

    Attributes:
        frequencies: angle per position of each pair, float32 values.
        amplitude: factor on cos and sin.
    """

    frequencies: tuple[float, ...]
    amplitude: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head turn, from the first on."""
        return 2 * len(self.frequencies)

    def array(self) -> np.ndarray:
        """Return the frequencies as float32 (rotary_dim / 2,)."""
        return np.array(self.frequencies, np.float32)


def rope_table(
    kind: str, theta: float, rotary_dim: int, settings: Mapping[str, Any], context: int
) -> RopeTable:
    """Return the table of a rule.

    Args:
        kind: ``default``; ``linear`` (positions divided by ``factor``); ``dynamic`` (NTK-aware
            base); ``llama3`` (as Llama 3.1's checkpoints define it); ``yarn`` (Peng et al., arXiv
            2309.00071); ``longrope`` (Ding et al., arXiv 2402.13753).
        theta: base of the frequencies.
        rotary_dim: elements of a head that turn, even.
        settings: what the rule needs, with the keys of config.json; lengths in tokens. All but
            ``default`` and ``linear`` need ``original_max_position_embeddings``.
        context: longest sequence, in tokens. Two rules depend on the length of a sequence. Keys in
            a cache keep the angles they went in with, so both are decided once: beyond the original
            length, ``dynamic`` takes the base of a sequence as long as the context, and
            ``longrope`` its long factors, for all positions.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    amplitude = 1.0
    if kind == "dynamic":
        factor, original = settings["factor"], settings["original_max_position_embeddings"]
        stretch = factor * max(context, original) / original - (factor - 1)
        theta = theta * stretch ** (rotary_dim / (rotary_dim - 2))
    plain = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    if kind in ("default", "dynamic"):
        frequencies = plain
    elif kind == "linear":
        frequencies = plain * np.float32(1.0 / settings["factor"])
    elif kind == "llama3":
        frequencies = _llama3(plain, settings)
    elif kind == "yarn":
        frequencies = _yarn(plain, theta, rotary_dim, settings)
        amplitude = _yarn_amplitude(settings)
    elif kind == "longrope":
        original = settings["original_max_position_embeddings"]
        factors = settings["long_factor" if context > original else "short_factor"]
        frequencies = plain / np.asarray(factors, np.float32)
        amplitude = _longrope_amplitude(settings)
    else:
        raise ValueError(f"no rope rule {kind!r}")
    return RopeTable(tuple(frequencies.astype(np.float32).tolist()), amplitude)


def _llama3(plain: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Fade from unscaled to divided by ``factor`` between two numbers of turns in a context."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (keep + (1 - keep) / settings["factor"])


def _yarn(
    plain: np.ndarray, theta: float, rotary_dim: int, settings: Mapping[str, Any]
) -> np.ndarray:
    """Fade likewise, linearly in the index of the pair (section 3.2, "NTK-by-parts")."""
    length = settings["original_max_position_embeddings"]

    def index_of(turns: float) -> float:
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(settings["beta_fast"]), index_of(settings["beta_slow"])
    if settings["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first if last != first else 0.001
    scaled = np.clip((np.arange(len(plain), dtype=np.float32) - first) / width, 0.0, 1.0)
    return plain * (1 - scaled) + plain / np.float32(settings["factor"]) * scaled


def _yarn_amplitude(settings: Mapping[str, Any]) -> float:
    """Return equation 22 of the paper; checkpoints with ``mscale`` give two weights of the log."""
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def grown(weight: float) -> float:
        factor = settings["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = settings.get("mscale"), settings.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)


def _longrope_amplitude(settings: Mapping[str, Any]) -> float:
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    factor, length = settings["factor"], settings["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0


def rotate(x: np.ndarray, positions: Sequence[int] | np.ndarray, table: RopeTable) -> np.ndarray:
    """Rotate heads x (tokens, heads, head_dim) at int (tokens,), in float64: the reference."""
    half = len(table.frequencies)
    angle = np.asarray(positions, np.float64)[:, None, None] * table.array().astype(np.float64)
    cos, sin = table.amplitude * np.cos(angle), table.amplitude * np.sin(angle)
    a, b, rest = np.split(x.astype(np.float64), [half, 2 * half], axis=2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=2)
