"""`Space`: all settings of a kernel's knobs, as points for the search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.tune.tasks import Task

MAX_POINTS = 200_000
"""Most points that are kept in memory and looked at by the cost model."""

Point = tuple[int, ...]
"""An index into the values of each knob."""


@dataclass(frozen=True)
class Space:
    """The product of knobs' values.

    Attributes:
        names: knobs, in the kernel's order.
        values: of each knob, its default first.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, task: Task) -> Space:
        """Return the space of a task's kernel, with the knobs that its weights demand fixed.

        Raises:
            FairyError: it is too large to search.
        """
        knobs = {name: tuple(values) for name, values in task.kernel.knobs.items()}
        knobs |= {name: (value,) for name, value in task.demands.items() if name in knobs}
        space = cls(tuple(knobs), tuple(knobs.values()))
        if space.size > MAX_POINTS:
            raise FairyError(
                f"{task.kernel_name} has {space.size} settings of its knobs; the search takes at "
                f"most {MAX_POINTS}"
            )
        return space

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(map(len, self.values))

    def points(self) -> list[Point]:
        """Return all points; the first is that of the defaults."""
        return list(itertools.product(*(range(len(v)) for v in self.values)))

    def knobs(self, point: Point) -> dict[str, Any]:
        """Return knob -> value, all of them."""
        return {n: v[i] for n, v, i in zip(self.names, self.values, point, strict=True)}

    def changed(self, knobs: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of ``knobs`` that differ from the defaults."""
        defaults = {n: v[0] for n, v in zip(self.names, self.values, strict=True)}
        return {n: v for n, v in knobs.items() if n in defaults and defaults[n] != v}

    def point(self, knobs: Mapping[str, Any]) -> Point | None:
        """Return the point of ``knobs``, defaults for the rest; None if a value is not allowed."""
        found = []
        for name, values in zip(self.names, self.values, strict=True):
            value = knobs.get(name, values[0])
            if value not in values:
                return None
            found.append(values.index(value))
        return tuple(found)

    def features(self, points: Sequence[Point]) -> np.ndarray:
        """Return float64 (points, knobs): the rank of each value, and an order for the names.

        Numbers become their rank among the knob's numbers, scaled to 0 .. 1, names their index.
        """
        columns = []
        for values, indices in zip(self.values, zip(*points, strict=True), strict=True):
            ranks = _ranks(values)
            columns.append([ranks[i] for i in indices])
        return np.array(columns, np.float64).T.reshape(len(points), len(self.names))

    @property
    def ordered(self) -> np.ndarray:
        """Which knobs are numbers, so that neighbouring values are alike: bool (knobs,)."""
        return np.array([all(_is_number(v) for v in values) for values in self.values])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ranks(values: Sequence[Any]) -> list[float]:
    if not all(map(_is_number, values)):
        return [float(i) for i in range(len(values))]
    order = sorted(values)
    return [order.index(v) / max(1, len(order) - 1) for v in values]
