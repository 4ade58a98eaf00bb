"""Weights that already hold phase values: found, and taken apart into the codes they came from.

The phase rule is not idempotent. Applied to a weight that is itself the dequantised form of a
T-stage tensor, it computes other scales and moves the weight by several percent. Such baked weights
are recognised by their values: a stage contributes -r, 0 or +r to a real part and -q, 0 or +q to an
imaginary part, so within one scale tile Re U takes at most 3^T values, the signed sums of
r_1 .. r_T with signs -1, 0, +1; likewise Im U, Re W and Im W.

For every tile and term: cluster the values of each part into such levels; read r and q off the
levels; pair them into stages so that the 4^T sums of phase values explain every (re, im) pair that
occurs; refit the scales to the levels by least squares. Anything that does not fit to rounding
error ends the attempt, and the weight counts as not baked.

From float32 weights the scales come back to 1e-6 relative; from float16 and bfloat16 ones to the
rounding of the stored weight. The levels must stand apart by more than that rounding: T = 1 and 2
do in every dtype, except single rows of bfloat16; T = 3 does in float32 and float16 with tensor
scales; T = 4 in float32 and very large tensors. A small tile may lack the values that show its
scales; then, too, the attempt ends. A weight whose first tile has fewer than 4^(T+1) entries is
never taken for baked, since a few values prove nothing. Stages come back ordered by falling real
scale, which is the order in which the rule makes them.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np

from fairy_compile.config import Granularity
from fairy_compile.phase import FAIRY2I_MIN_SCALE, PhaseTensor, tile_shape, to_widely_linear

_SAMPLE = 4096


def recover_baked(
    weight: np.ndarray, stages: int, scale: Granularity = "tensor"
) -> PhaseTensor | None:
    """Return the phase tensor whose dequantised form is ``weight``, or None if there is none.

    Args:
        weight: real (2n, 2m), both even, in float32, float16 or bfloat16.
        stages: T of the tensor looked for.
        scale: granularity of the tensor looked for.

    Returns:
        `PhaseTensor` with terms ("U", "W") and float32 scales that reproduces ``weight`` to the
        rounding of its dtype.
    """
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    tile = tile_shape(scale, n, m)
    roundoff = float(ml_dtypes.finfo(weight.dtype).eps) / 2
    if not _sample_looks_baked(weight, stages, tile, roundoff):
        return None
    pair = to_widely_linear(weight)
    starts = [range(0, n, tile[0]), range(0, m, tile[1])]
    codes = np.empty((stages, 2, n, m), np.uint8)
    scales = np.empty((stages, 2, 2, len(starts[0]), len(starts[1])), np.float32)
    for (i, row), (j, column) in itertools.product(*map(enumerate, starts)):
        area = (slice(row, row + tile[0]), slice(column, column + tile[1]))
        parts = [[part[area] for part in term] for term in pair]
        tolerance = _tolerance(parts, roundoff)
        for k, (re, im) in enumerate(parts):
            fit = _fit_tile(re, im, stages, tolerance)
            if fit is None:
                return None
            codes[:, k, area[0], area[1]], scales[:, k, :, i, j] = fit
    return PhaseTensor.from_codes(codes, scales, terms=("U", "W"), scale=scale)


def _tolerance(parts: list[list[np.ndarray]], roundoff: float) -> float:
    """Bound how far values of one level may lie apart.

    Entries of A are up to twice the largest part and were rounded to the stored dtype, and a part
    is half the sum of two of them: an error of 2 roundoffs up or down. The float32 sums over
    stages and of the transform, there and back, add a few float32 roundoffs, 24 of them at most.
    """
    largest = max(float(np.abs(part).max()) for term in parts for part in term)
    return max(4 * roundoff, 24 * 2.0**-24) * largest


def _sample_looks_baked(
    weight: np.ndarray, stages: int, tile: tuple[int, int], roundoff: float
) -> bool:
    """Cheap test that lets no baked weight slip and stops nearly all others: a few rows."""
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    height, width = min(tile[0], n), min(tile[1], m)
    if height * width < 4 ** (stages + 1):
        return False
    rows = np.arange(min(height, -(-_SAMPLE // width)))
    columns = np.arange(width)
    both = np.ix_(np.concatenate([rows, n + rows]), np.concatenate([columns, m + columns]))
    parts = [list(term) for term in to_widely_linear(weight[both])]
    tolerance = _tolerance(parts, roundoff)
    return all(_levels(part, stages, tolerance) is not None for term in parts for part in term)


def _levels(values: np.ndarray, stages: int, tolerance: float) -> np.ndarray | None:
    """Return the sorted levels (float64) that ``values`` cluster at, or None if over 3^T.

    A cluster ends where the next value is more than ``tolerance`` away, and may not be wider.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    first = np.concatenate([[0], np.flatnonzero(np.diff(ordered) > tolerance) + 1])
    last = np.append(first[1:], ordered.size) - 1
    if first.size > 3**stages or (ordered[last] - ordered[first]).max() > tolerance:
        return None
    return np.add.reduceat(ordered, first) / (last - first + 1)


def _steps(levels: np.ndarray, stages: int, tolerance: float) -> list[float] | None:
    """Return r_1 >= .. >= r_T whose signed sums the levels are, or None.

    With a level its negative is possible too. Below the largest, the sum of all r, possible levels
    lie at distances sum(d_t r_t) with d_t in 0, 1, 2. Taken from small to large, a distance not
    made of the r found so far is the next r. Stages that no weight of the tile uses on this axis
    leave no trace; their r is 0.
    """
    sizes = np.abs(levels)
    largest = sizes.max()
    steps: list[float] = []
    reached = np.zeros(1)
    for distance in largest - np.sort(np.concatenate([sizes, -sizes]))[::-1]:
        if len(steps) < stages and np.abs(reached - distance).min() > 2 * tolerance:
            steps.append(float(distance))
            reached = (reached[:, None] + distance * np.arange(3)).ravel()
    if abs(sum(steps) - largest) > (stages + 1) * tolerance:
        return None
    return steps[::-1] + [0.0] * (stages - len(steps))


def _phase_signs(stages: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all 4^T code tuples and the signs their stages have in the real and imaginary part."""
    codes = np.array(list(itertools.product(range(4), repeat=stages)), np.uint8)
    return codes, np.array([1, 0, -1, 0])[codes], np.array([0, 1, 0, -1])[codes]


def _fit_tile(
    re: np.ndarray, im: np.ndarray, stages: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Take one tile of one term apart.

    Args:
        re: real parts (rows, columns).
        im: imaginary parts (rows, columns).
        stages: T.
        tolerance: width of a level.

    Returns:
        codes uint8 (T, rows, columns) and scales float32 (T, 2), or None.
    """
    re_levels, im_levels = (_levels(part, stages, tolerance) for part in (re, im))
    if re_levels is None or im_levels is None:
        return None
    re_steps, im_steps = (_steps(part, stages, tolerance) for part in (re_levels, im_levels))
    if re_steps is None or im_steps is None:
        return None
    # Which level each entry is at; the middle between two levels parts them.
    at_re, at_im = (
        np.searchsorted((levels[1:] + levels[:-1]) / 2, part)
        for levels, part in ((re_levels, re), (im_levels, im))
    )
    pairs, entry = np.unique(at_re * len(im_levels) + at_im, return_inverse=True)
    points_re, points_im = re_levels[pairs // len(im_levels)], im_levels[pairs % len(im_levels)]
    table, sign_re, sign_im = _phase_signs(stages)
    # Of the pairings that fit, the first: im_steps falls too, as the rule's scales do.
    re_steps = np.array(re_steps)
    for order in map(np.array, itertools.permutations(im_steps)):
        away = np.maximum(
            np.abs(points_re[:, None] - sign_re @ re_steps),
            np.abs(points_im[:, None] - sign_im @ order),
        )
        # A step is 0 where no weight used that stage on that axis, so none may now.
        unused = ((sign_re != 0) & (re_steps == 0)) | ((sign_im != 0) & (order == 0))
        away[:, unused.any(axis=1)] = np.inf
        nearest = away.argmin(axis=1)
        if away[np.arange(len(pairs)), nearest].max() <= (stages + 1) * tolerance:
            break
    else:
        return None
    fitted = [
        np.linalg.lstsq(signs[nearest], points, rcond=None)[0]  # 0 for unused stages
        for signs, points in ((sign_re, points_re), (sign_im, points_im))
    ]
    scales = np.maximum(np.stack(fitted, axis=1), FAIRY2I_MIN_SCALE).astype(np.float32)
    codes = table[nearest][entry.reshape(re.shape)]
    return np.moveaxis(codes, -1, 0), scales
