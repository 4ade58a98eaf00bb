"""Means over tokens with standard errors over windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Attributes:
        mean: over all tokens.
        stderr: its standard error over windows; None for a single window.
    """

    mean: float
    stderr: float | None

    @classmethod
    def of(cls, sums: np.ndarray, counts: np.ndarray) -> Estimate:
        """Estimate from sums over the tokens of each window.

        Tokens of a window depend on each other, so windows are the sample: the error is that of a
        ratio of sums, sqrt(k/(k-1) Σ (sum - mean count)²) / Σ count for k windows. With windows of
        equal length it is the standard deviation of their means over sqrt(k). For a difference of
        two models, give sums of differences: the error is then that of pairs.

        Args:
            sums: float64 (windows,).
            counts: tokens scored of each window (windows,).
        """
        total, windows = counts.sum(), len(sums)
        mean = sums.sum() / total
        if windows < 2:
            return cls(float(mean), None)
        residual = float(np.square(sums - mean * counts).sum())
        return cls(float(mean), math.sqrt(windows / (windows - 1) * residual) / float(total))

    def show(self, digits: int, scale: float = 1.0) -> str:
        """Return ``mean ± stderr`` times ``scale``."""
        text = f"{self.mean * scale:.{digits}f}"
        return text if self.stderr is None else f"{text} ± {self.stderr * scale:.{digits}f}"

    def show_small(self, sign: str = "") -> str:
        """Return the same of a figure that may be far below 1; ``sign`` "+" shows its sign."""
        text = f"{self.mean:{sign}.3g}"
        return text if self.stderr is None else f"{text} ± {self.stderr:.1g}"

    def to_json(self) -> dict[str, Any]:
        """Return both figures."""
        return {"mean": self.mean, "stderr": self.stderr}
