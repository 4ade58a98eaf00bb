"""The 4^T sums of T phase values, folded by their symmetry.

A weight quantised with T stages is a sum of T terms, each +-s_re,t or +-i s_im,t. With all signs
free the set of sums is symmetric about both axes, so the nearest sum to a weight is found in the
quadrant re, im >= 0 and carries the weight's own signs. Folded, 4^T sums are few points:

    T        1    2    3    4
    points   2    6   20   72

A point is a choice of axis for every stage, and for the stages that share an axis a choice of
signs relative to the first of them.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Codebook:
    """The folded sums of T stages.

    Attributes:
        re: int8 (points, T), the factor -1, 0 or 1 of s_re,t in the real part of a point.
        im: int8 (points, T), likewise of s_im,t in the imaginary part. Each stage has exactly one
            factor that is not 0, in ``re`` or in ``im``.
    """

    re: np.ndarray
    im: np.ndarray

    @property
    def stages(self) -> int:
        """T."""
        return self.re.shape[1]

    @property
    def size(self) -> int:
        """Number of folded points."""
        return self.re.shape[0]

    def points(self, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Place the points for given scales, in the quadrant re, im >= 0.

        Args:
            scales: (T, 2, ...), axis 1 being (re, im).

        Returns:
            re and im parts (points, ...), and the signs by which ``self.re`` and ``self.im`` were
            turned over to bring them there, int8 (points, ...).
        """
        re = np.tensordot(self.re.astype(scales.dtype), scales[:, 0], 1)
        im = np.tensordot(self.im.astype(scales.dtype), scales[:, 1], 1)
        turn_re, turn_im = (np.where(part < 0, -1, 1).astype(np.int8) for part in (re, im))
        return np.abs(re), np.abs(im), turn_re, turn_im

    def code_table(self) -> np.ndarray:
        """Return uint8 (points, 2, 2, T): codes by point, turned real sign, turned imaginary sign.

        Index 1 on a sign axis means that the part of the weight and the point's own part, as
        ``self.re`` or ``self.im`` give it, have opposite signs.
        """
        on_imag = (self.im != 0).astype(np.uint8)
        table = np.empty((self.size, 2, 2, self.stages), np.uint8)
        for turned_re, turned_im in itertools.product((0, 1), repeat=2):
            negative = np.where(on_imag, (self.im < 0) ^ turned_im, (self.re < 0) ^ turned_re)
            table[:, turned_re, turned_im] = on_imag + 2 * negative
        return table


@functools.cache
def codebook(stages: int) -> Codebook:
    """Return the folded codebook of T = ``stages``, 1 to 4."""
    factors = []
    for axes in itertools.product((0, 1), repeat=stages):  # 0: real, 1: imaginary
        groups = [[t for t in range(stages) if axes[t] == axis] for axis in (0, 1)]
        # The first stage of each axis is positive; the fold gives the other sign.
        free = [t for group in groups for t in group[1:]]
        for signs in itertools.product((1, -1), repeat=len(free)):
            row = np.ones(stages, np.int8)
            row[free] = signs
            factors.append([row * (np.array(axes) == axis) for axis in (0, 1)])
    both = np.array(factors, np.int8)
    both.setflags(write=False)
    return Codebook(both[:, 0], both[:, 1])
