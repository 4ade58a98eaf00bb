"""Search strategies: which point of a space to measure next.

A strategy is asked for points and told their scores, in any order. `ModelSearch` fits a Gaussian
process to the logarithms of the scores and asks for the points of largest expected improvement
(Jones, Schonlau and Welch, "Efficient global optimization", 1998): spaces have hundreds of points,
measurements are noisy, and a few dozen of them have to do. `RandomSearch` is what it has to beat.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from fairy_compile.tune.space import Point, Space

FAILED = 4.0
"""The score of what does not build, run or compute right: bad, but not so that it bends a model."""


_NOISE = 0.02  # variance of standardised scores that the model leaves to measurement
_MOST, _MOST_FITTED = 160, 64  # scores to predict from, and to fit lengths to


class Search(Protocol):
    """What a tuning session asks; each point is asked for once, unless it is forgotten."""

    def ask(self, count: int) -> list[Point]:
        """Return up to ``count`` points to measure; none when all have been asked for."""

    def tell(self, point: Point, score: float) -> None:
        """Learn a score: seconds over those of the default, `FAILED` for none."""

    def forget(self, point: Point) -> None:
        """Take back what was told or asked of a point: it may be asked for again."""


class RandomSearch:
    """Points in random order, ``first`` ones first."""

    def __init__(self, space: Space, seed: int = 0, first: Sequence[Point] = ()) -> None:
        rest = [p for p in space.points() if p not in set(first)]
        random.Random(seed).shuffle(rest)
        self._queue = [*dict.fromkeys(first), *rest]

    def ask(self, count: int) -> list[Point]:
        """See `Search.ask`."""
        asked, self._queue = self._queue[:count], self._queue[count:]
        return asked

    def tell(self, point: Point, score: float) -> None:
        """See `Search.tell`; it learns nothing."""
        if point in self._queue:
            self._queue.remove(point)

    def forget(self, point: Point) -> None:
        """See `Search.forget`."""
        if point not in self._queue:
            self._queue.append(point)


class ModelSearch:
    """Expected improvement under a Gaussian process.

    The covariance of two points is exp(-sum_k d_k / l_k), with d_k the difference of ranks of a
    knob that is a number, and 0 or 1 for one that is a name; the lengths l_k are fitted, so that
    knobs that do not matter come to span the space.

    Args:
        space: the points.
        seed: of what is random.
        first: points to ask for before anything else; the default point should be among them.
        initial: points that fill the space, asked for before the model is used.
    """

    def __init__(
        self, space: Space, seed: int = 0, first: Sequence[Point] = (), initial: int = 6
    ) -> None:
        self._space = space
        self._random = np.random.default_rng(seed)
        self._points = space.points()
        self._index = {p: i for i, p in enumerate(self._points)}
        self._open = np.ones(len(self._points), bool)
        self._first = list(dict.fromkeys(first))
        self._initial = initial
        self._scores: dict[Point, float] = {}
        self._pending: set[Point] = set()
        features = space.features(self._points)
        self._features, self._ordered = features, space.ordered
        self._lengths = np.full(len(space.names), 1.0)

    def ask(self, count: int) -> list[Point]:
        """See `Search.ask`."""
        asked: list[Point] = []
        belief: _Belief | None = None
        while len(asked) < count and self._open.any():
            point = self._given()
            if point is None:
                if belief is None:
                    self._fit()
                    belief = self._believe()
                index = int(np.argmax(np.where(self._open, belief.improvement(), -1.0)))
                belief.expect(index)  # so that a batch spreads out
                point = self._points[index]
            self._open[self._index[point]] = False
            self._pending.add(point)
            asked.append(point)
        return asked

    def tell(self, point: Point, score: float) -> None:
        """See `Search.tell`."""
        self._open[self._index[point]] = False
        self._pending.discard(point)
        self._scores[point] = math.log(min(max(score, 1e-3), FAILED))

    def forget(self, point: Point) -> None:
        """See `Search.forget`."""
        self._open[self._index[point]] = True
        self._pending.discard(point)
        self._scores.pop(point, None)

    def _given(self) -> Point | None:
        """Return a point that needs no model; None where there is enough for one."""
        while self._first:
            point = self._first.pop(0)
            if self._open[self._index[point]]:
                return point
        seen = len(self._scores) + len(self._pending)
        return self._spread_out() if seen < self._initial or len(self._scores) < 2 else None

    def _spread_out(self) -> Point:
        """Return an open point far from all that were asked for, of a random few."""
        open_points = np.flatnonzero(self._open)
        few = self._random.choice(open_points, min(64, len(open_points)), replace=False)
        taken = [self._index[p] for p in (*self._scores, *self._pending)]
        if not taken:
            return self._points[int(few[0])]
        nearest = self._distances(few, np.array(taken)).sum(axis=2).min(axis=1)
        return self._points[int(few[np.argmax(nearest)])]

    def _distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return float64 (a, b, knobs)."""
        apart = np.abs(self._features[a][:, None] - self._features[b][None])
        return np.where(self._ordered, apart, apart > 0)

    def _data(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return indices of points and their standardised scores: half the best, half the last."""
        points = list(self._scores)
        if len(points) > most:
            best = sorted(points, key=self._scores.__getitem__)[: most // 2]
            rest = [p for p in points if p not in set(best)]
            points = [*best, *rest[-(most - len(best)) :]]
        scores = np.array([self._scores[p] for p in points])
        y = (scores - scores.mean()) / max(scores.std(), 1e-3)
        return np.array([self._index[p] for p in points]), y

    def _covariance(self, distances: np.ndarray) -> np.ndarray:
        return np.exp(-(distances / self._lengths).sum(axis=2))

    def _believe(self) -> _Belief:
        """Return what the scores so far say of all points, those under way counted as expected."""
        known, y = self._data(_MOST)
        everywhere = np.arange(len(self._points))
        across = self._covariance(self._distances(known, everywhere))
        belief = _Belief(
            across[:, known],
            across,
            y,
            lambda i: self._covariance(self._distances(np.array([i]), everywhere))[0],
        )
        for point in sorted(self._pending):
            belief.expect(self._index[point])
        return belief

    def _fit(self) -> None:
        """Improve the lengths, one knob at a time, by the likelihood of the scores."""
        if len(self._scores) < max(2, self._initial):
            return
        known, y = self._data(_MOST_FITTED)
        distances = self._distances(known, known)
        best = self._likelihood(distances, y, self._lengths)
        for knob in range(len(self._lengths)):
            for factor in (0.4, 2.5):
                lengths = self._lengths.copy()
                lengths[knob] = float(np.clip(lengths[knob] * factor, 0.1, 100.0))
                value = self._likelihood(distances, y, lengths)
                if value > best:
                    best, self._lengths = value, lengths

    def _likelihood(self, distances: np.ndarray, y: np.ndarray, lengths: np.ndarray) -> float:
        among = np.exp(-(distances / lengths).sum(axis=2)) + _NOISE * np.eye(len(y))
        factor = np.linalg.cholesky(among)
        half = np.linalg.solve(factor, y)
        # Lengths are log-normal around 1 beforehand, so that few scores do not drive them away.
        prior = (np.log(lengths) ** 2).sum() / 8
        return float(-0.5 * half @ half - np.log(np.diag(factor)).sum() - prior)


class _Belief:
    """A Gaussian process given some scores: mean and variance of every point.

    Args:
        among: covariance of the known points, (n, n).
        across: of known and all points, (n, points).
        y: scores of the known points, standardised.
        row: index -> covariance of that point and all points.
    """

    def __init__(
        self,
        among: np.ndarray,
        across: np.ndarray,
        y: np.ndarray,
        row: Callable[[int], np.ndarray],
    ) -> None:
        factor = np.linalg.cholesky(among + _NOISE * np.eye(len(y)))
        self._half = np.linalg.solve(factor, across)
        self._row, self._best = row, float(y.min())
        self.mean = self._half.T @ np.linalg.solve(factor, y)
        self.variance = 1.0 - (self._half**2).sum(axis=0)

    def expect(self, index: int) -> None:
        """Take a point's score to be its mean: its neighbours become more certain."""
        covariance = self._row(index) - self._half.T @ self._half[:, index]
        step = covariance / math.sqrt(max(self.variance[index], 0.0) + _NOISE)
        self._half = np.concatenate([self._half, step[None]])
        self.variance = self.variance - step**2

    def improvement(self) -> np.ndarray:
        """Return the expected improvement over the best score, at every point."""
        deviation = np.sqrt(np.maximum(self.variance, 1e-9))
        gain = self._best - self.mean
        z = gain / deviation
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])
        return np.maximum(gain * below + deviation * density, 0)
