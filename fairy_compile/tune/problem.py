"""A task's inputs, the output every candidate has to give, and how far it may be off.

Codes and x are random. Scales are such that every table mode holds the weights without error:
halved from stage to stage, those of U twice those of W. So all candidates of a task compute the
same function up to rounding, and one bound serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from fairy_compile.op import ACT_LEVELS, PhaseSpec, phase_gemm_reference
from fairy_compile.phase import PhaseTensor, tile_shape
from fairy_compile.tune.tasks import Task

_ROWS = 512  # complex rows of a weight that are dequantised at a time; a multiple of tile64's
_CONFIDENCE = 8.0  # lambda: an error beyond the bound has a probability below 2 n exp(-32)
_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Problem:
    """Inputs and expected outputs of a task.

    Attributes:
        arrays: packed weights, in the order of kernel arguments.
        x: rows -> x, (rows, 2m) in the task's dtype.
        expected: rows -> y, float64 (rows, 2n).
        bound: rows -> largest error of each row, float64 (rows, 1).
    """

    arrays: tuple[np.ndarray, ...]
    x: dict[int, np.ndarray]
    expected: dict[int, np.ndarray]
    bound: dict[int, np.ndarray]

    def error(self, rows: int, y: np.ndarray) -> str | None:
        """Return what is wrong with an output of so many rows, in words; None if it is right."""
        want = self.expected[rows]
        if y.shape != want.shape:
            return f"the output has shape {y.shape}; expected {want.shape}"
        off = np.abs(y.astype(np.float64) - want)
        limit = self.bound[rows] + _UNIT[str(y.dtype)] * np.abs(want)
        wrong = ~(off <= limit)  # NaN is wrong, too
        if not wrong.any():
            return None
        row, column = map(int, np.argwhere(wrong)[0])
        return (
            f"{int(wrong.sum())} of {wrong.size} outputs are wrong with {rows} rows; at "
            f"[{row}, {column}]: {float(y[row, column]):.6g} instead of "
            f"{want[row, column]:.6g} ± {limit[row, column]:.2g}"
        )


def make_problem(task: Task, seed: int = 0) -> Problem:
    """Make the inputs of a task and compute what it should give."""
    spec = task.spec
    parts = make_parts(spec, seed)
    rng = np.random.default_rng(seed + 1)
    most = rng.standard_normal((max(task.rows), spec.in_features)).astype(spec.dtype)
    largest = _reference(most, parts, spec)
    limit = _bound(most, parts, spec)
    return Problem(
        arrays=tuple(task.kernel.layout.pack(parts, spec).values()),
        x={b: np.ascontiguousarray(most[:b]) for b in task.rows},
        expected={b: largest[:b] for b in task.rows},
        bound={b: limit[:b] for b in task.rows},
    )


def make_parts(spec: PhaseSpec, seed: int = 0) -> list[PhaseTensor]:
    """Return weights of a call that every table mode holds exactly."""
    rng = np.random.default_rng(seed)
    terms = len(spec.terms)
    halved = 2.0 ** (spec.stages - 1 - np.arange(spec.stages))
    ratio = halved[:, None] * np.array([2.0, 1.0][:terms])  # (T, terms)
    parts = []
    for n in spec.parts:
        codes = rng.integers(0, 4, (spec.stages, terms, n, spec.m), dtype=np.uint8)
        rows, columns = tile_shape(spec.scale, n, spec.m)
        units = rng.uniform(0.01, 0.03, (2, -(-n // rows), -(-spec.m // columns)))
        scales = (ratio[:, :, None, None, None] * units.astype(np.float32)).astype(np.float32)
        parts.append(PhaseTensor.from_codes(codes, scales, spec.terms, spec.scale))
    return parts


def _reference(x: np.ndarray, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> np.ndarray:
    """Return `phase_gemm_reference`, a slice of each weight at a time: a head has gigabytes."""
    columns = []
    for part in parts:
        halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for first in range(0, part.n, _ROWS):
            piece = _rows(part, first, min(first + _ROWS, part.n))
            y = phase_gemm_reference(x.astype(np.float32), [piece], spec.act)
            for half, of_piece in zip(halves, np.split(y, 2, axis=1), strict=True):
                half.append(of_piece)
        columns += [*halves[0], *halves[1]]
    return np.concatenate(columns, axis=1)


def _rows(part: PhaseTensor, first: int, end: int) -> PhaseTensor:
    tile = tile_shape(part.scale, part.n, part.m)[0]
    scales = part.scales
    if part.scale != "tensor":
        scales = scales[:, :, :, first // tile : -(-end // tile)]
    codes = part.codes[:, :, first:end]
    return PhaseTensor(codes, scales, end - first, part.m, part.terms, part.scale)


def _bound(x: np.ndarray, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> np.ndarray:
    """Return the largest error that rounding explains, (rows, 1).

    By Higham and Mary, "A new approach to probabilistic rounding error analysis" (2019), a sum of
    N floating point terms is off by at most lambda sqrt(N) u S with a probability of 1 - 2 N
    exp(-lambda^2 / 2), S being the sum of their sizes. |x| times the largest weight, over a row,
    bounds S. With quantised activations integers are exact and there is one term for each flush
    (64 or 128 columns), stage, term, half of x and axis; with float activations one for each
    column. Scales and their products add a few roundings each, which N counts as well. Weights of
    float16 and bfloat16 are rounded themselves, which adds lambda u |x| w, in root mean square.
    """
    weight = max(float(p.scales.max(axis=2).sum(axis=(0, 1)).max()) for p in parts)
    size = np.abs(x.astype(np.float64)).sum(axis=1, keepdims=True) * weight
    flush = 64 if spec.scale == "tile64" else 128
    if spec.act in ACT_LEVELS:
        terms = -(-spec.m // flush) * spec.stages * len(spec.terms) * 4
    else:
        terms = spec.in_features * spec.stages * len(spec.terms)
    bound = _CONFIDENCE * np.sqrt(3 * terms + 11) * _UNIT["float32"] * size
    if spec.dtype != "float32":
        norm = np.sqrt((x.astype(np.float64) ** 2).sum(axis=1, keepdims=True)) * weight
        bound = bound + _CONFIDENCE * 2 * _UNIT[spec.dtype] * norm
    return bound
