"""Packed weights of the x86 kernels: codes and scales, and the integers of combined panels.

With many tokens it pays to turn the codes of a row tile into the real 2 x 2 blocks they stand for,
    [Re y]   [Re U + Re W   Im W - Im U] [Re x]
    [Im y] = [Im U + Im W   Re U - Re W] [Im x]
as integer *panels*, and to multiply those. What a panel holds is a choice, its *table mode*:

- ``combined``: all codes of a weight at once, four dot products in all. The scales of one axis
  (real or imaginary) become integers in one unit; `combine_scales` bounds the error.
- ``words``: the same with integers of 16 bits, which makes it as good as exact.
- ``joint``: pairs of stages, in the ratios of `joint_ratio`, as in the joint tables.
- ``split``: one code each; exact.

Real and imaginary axes need no common unit, as they never meet in one integer sum: Re U + Re W
multiplies one half of x and Im W - Im U the other, and the halves have scales of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fairy_compile.kernels.base import ArraySpec
from fairy_compile.kernels.x86_layout import X86Layout
from fairy_compile.kernels.x86_tables import combined_arrays
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor

MIN_TOKENS = 9
"""Fewest rows of x that are worth decoding panels for; below, the decode kernel reads less."""

TableMode = Literal["combined", "words", "joint", "split"]

BYTE_LIMIT, WORD_LIMIT = 127, 32767  # what int8 and int16 hold
_UNIT_STEP = 0.5
_UNITS = 96  # candidates; with int16 there is little to choose between
_AT_ONCE = 4096


@dataclass(frozen=True)
class Panel:
    """A set of codes that are summed as integers.

    Attributes:
        codes: (term, stage) indices.
        scale: index of its real axis among the scales of the mode; the imaginary one follows.
    """

    codes: tuple[tuple[int, int], ...]
    scale: int


def panels(terms: int, stages: int, mode: TableMode) -> list[Panel]:
    """Return the panels of a table mode."""
    every = [(term, stage) for term in range(terms) for stage in range(stages)]
    if mode in ("combined", "words"):
        return [Panel(tuple(every), 0)]
    if mode == "split":
        return [Panel((code,), 2 * i) for i, code in enumerate(every)]
    pairs = [
        ((term, 2 * pair), (term, 2 * pair + 1))
        for term in range(terms)
        for pair in range(stages // 2)
    ]
    odd = [((term, stages - 1),) for term in range(terms)] if stages % 2 else []
    return [Panel(codes, 2 * i) for i, codes in enumerate([*pairs, *odd])]


def combine_scales(
    scales: np.ndarray, limit: int = BYTE_LIMIT
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Approximate vectors of scales by integers times a unit, the integers adding up to <= limit.

    The best of some units is taken. Bound: among them is 's sum / (limit - k / 2)', at which
    rounding cannot exceed the limit and moves a scale by half a unit at most, so that
    |s - unit p| / |s| <= k / (2 limit - k) for k scales. With 127: 0.8 % for T = 1, 1.6 % for T = 2
    and 3.3 % for T = 4 with two terms; typical are 0.05, 0.35 and 1.2 %. With 32767: 6e-5 for T = 2
    and 1.2e-4 for T = 4.

    Args:
        scales: float (vectors, k), not negative.
        limit: `BYTE_LIMIT` or less, or `WORD_LIMIT`.

    Returns:
        integers int8, or int16 for `WORD_LIMIT`, (vectors, k), units float32 (vectors,), errors
        |s - unit p| / |s| float64 (vectors,). A vector of zeros has integers, unit and error 0.
    """
    unique, inverse = np.unique(scales.astype(np.float64), axis=0, return_inverse=True)
    found = [_combine(unique[i : i + _AT_ONCE], limit) for i in range(0, len(unique), _AT_ONCE)]
    weights, units, errors = (np.concatenate(parts) for parts in zip(*found, strict=True))
    inverse = inverse.reshape(-1)
    return weights[inverse], units[inverse], errors[inverse]


def combined_dtype(limit: int) -> str:
    """Return the dtype of a panel's integers."""
    return "int8" if limit <= BYTE_LIMIT else "int16"


def _combine(scales: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = scales.shape[1]
    if limit <= BYTE_LIMIT:
        totals = np.arange(limit // 3, limit + _UNIT_STEP / 2, _UNIT_STEP)
    else:
        totals = np.linspace(limit * 0.9, limit, _UNITS)
    totals = np.union1d(totals, [limit - count / 2])
    size = np.linalg.norm(scales, axis=1)
    safe = np.where(size > 0, size, 1)
    unit = np.where(size > 0, scales.sum(axis=1), 1)[:, None] / totals  # (vectors, candidates)
    integers = np.rint(scales[:, None] / unit[..., None])
    squares = np.maximum((integers**2).sum(axis=-1), 1)
    fitted = (integers * scales[:, None]).sum(axis=-1) / squares  # least squares
    error = np.linalg.norm(scales[:, None] - fitted[..., None] * integers, axis=-1) / safe[:, None]
    error[integers.sum(axis=-1) > limit] = np.inf
    best = error.argmin(axis=1)
    rows = np.arange(len(scales))
    return (
        integers[rows, best].astype(combined_dtype(limit)),
        fitted[rows, best].astype(np.float32),
        error[rows, best],
    )


def combined_error(parts: Sequence[PhaseTensor], limit: int = BYTE_LIMIT) -> float:
    """Return the largest relative error, in the Frobenius norm, of any part's combined panels.

    That is also the relative error of its outputs for independent activations.
    """
    worst = 0.0
    for part in parts:
        vectors = _by_axis(part.scales).reshape(-1, part.stages * len(part.terms))
        squares = (vectors.astype(np.float64) ** 2).sum(axis=1)
        _, _, errors = combine_scales(vectors, limit)
        worst = max(worst, float(np.sqrt((errors**2 * squares).sum() / squares.sum())))
    return worst


def _by_axis(scales: np.ndarray) -> np.ndarray:
    """Reorder (T, terms, 2, ...) to (2, ..., terms * T)."""
    merged = scales.swapaxes(0, 1).reshape(-1, *scales.shape[2:])
    return np.moveaxis(merged, 0, -1)


class PanelLayout(X86Layout):
    """`X86Layout` with more arrays. Of the shapes of ``scales`` but for the units' dimension:

    - ``combined_weights`` int8: an integer for each unit, i.e. (term, stage, axis), those of an
      axis adding up to ``joint_limit`` at most;
    - ``combined_scales`` float32: the unit of each axis, 2;
    - ``words_weights`` int16 and ``words_scales``, likewise with `WORD_LIMIT`, if ``dotless``.

    And where `has_combined_tables`, those of `combined_arrays` with ``joint_limit``:

    - ``combined_tables`` uint8 (tiles, 4, 16) and ``combined_table_scales`` float32 (tiles, 1, 4).
    """

    def __init__(
        self,
        rows: int,
        joint_limit: int,
        dotless: bool = False,
    ) -> None:
        super().__init__(rows, joint_limit, pair_terms=True)
        self._dotless = dotless
        self._limits = {"combined": joint_limit, **({"words": WORD_LIMIT} if dotless else {})}
        self.name += "PW" if dotless else "P"

    def arrays(self, spec: PhaseSpec) -> dict[str, ArraySpec]:
        """See `Layout.arrays`."""
        arrays = super().arrays(spec)
        shape = arrays["scales"].shape
        for mode, limit in self._limits.items():
            arrays[f"{mode}_weights"] = ArraySpec(shape, combined_dtype(limit))
            arrays[f"{mode}_scales"] = ArraySpec((*shape[:2], 2, *shape[3:]), "float32")
        if self.has_combined_tables(spec):
            arrays["combined_tables"] = ArraySpec((shape[0], 4, 16), "uint8")
            arrays["combined_table_scales"] = ArraySpec((shape[0], 1, 4), "float32")
        return arrays

    def has_combined_tables(self, spec: PhaseSpec) -> bool:
        """Tell whether there are: if ``dotless``, with tensor scales, U and W, and two stages."""
        two = spec.stages == 2 and len(spec.terms) == 2
        return self._dotless and two and spec.scale == "tensor"

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """See `Layout.pack`."""
        packed = super().pack(parts, spec)
        scales = packed["scales"]
        tiles, column_tiles, units, *rows = scales.shape
        by_axis = scales.reshape(tiles, column_tiles, units // 2, 2, *rows)
        vectors = np.moveaxis(by_axis, 2, -1)  # (tiles, column tiles, axis(, R), codes)
        for mode, limit in self._limits.items():
            weights, axis_units, _ = combine_scales(vectors.reshape(-1, units // 2), limit)
            weights = np.moveaxis(weights.reshape(vectors.shape), -1, 2)
            packed[f"{mode}_weights"] = np.ascontiguousarray(weights.reshape(scales.shape))
            packed[f"{mode}_scales"] = axis_units.reshape(vectors.shape[:-1])
        if self.has_combined_tables(spec):
            self._pack_combined_tables(packed, vectors[:, 0])
        return packed

    def _pack_combined_tables(self, packed: dict[str, np.ndarray], vectors: np.ndarray) -> None:
        """Fill the tables from the scales of (tile, axis, (term, stage))."""
        unique, inverse = np.unique(vectors, axis=0, return_inverse=True)
        for i, scales in enumerate(unique):
            weights, units, _ = combine_scales(scales, self.joint_limit)
            by_term = weights.reshape(2, 2, 2).transpose(1, 2, 0)  # term, stage, axis
            tables, table_scales = combined_arrays(by_term, units, self.joint_limit)
            tiles = inverse.reshape(-1) == i
            packed["combined_tables"][tiles] = tables
            packed["combined_table_scales"][tiles, 0] = table_scales
