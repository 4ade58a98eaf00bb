"""`Spread`: repeated measurements of one number."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """One or more samples of a rate, in the order they were taken."""

    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Return the spread of ``samples``, at least one."""
        return cls(tuple(samples))

    @property
    def mean(self) -> float:
        """Arithmetic mean, what llama-bench calls ``avg_ts``."""
        return statistics.fmean(self.samples)

    @property
    def stddev(self) -> float:
        """Sample standard deviation (n - 1); 0 for one sample."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0

    @property
    def median(self) -> float:
        """Median, which one disturbed repetition does not move."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """Smallest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """Largest sample."""
        return max(self.samples)

    def to_json(self) -> dict[str, Any]:
        """Return the five figures and the samples themselves."""
        return {
            "mean": self.mean,
            "stddev": self.stddev,
            "median": self.median,
            "min": self.low,
            "max": self.high,
            "samples": list(self.samples),
        }
