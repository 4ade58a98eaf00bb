"""Random weights and activations for the kernels of every CPU family, and their tolerance."""

from __future__ import annotations

import numpy as np

from fairy_compile.kernels.x86_tables import joint_ratio_error
from fairy_compile.op import PhaseSpec, dequantize_activations, quantize_activations
from fairy_compile.phase import PhaseTensor, tile_shape

BOTH, ONLY_W = ("U", "W"), ("W",)


def make_spec(parts=(70, 9), m=200, stages=2, terms=BOTH, scale="tensor", act="int8") -> PhaseSpec:
    return PhaseSpec(parts, m, stages, terms, scale, act)


def make_parts(spec: PhaseSpec, seed=0, code=None) -> list[PhaseTensor]:
    """Random layers, later stages smaller; ``code`` makes all codes that one."""
    rng = np.random.default_rng(seed)
    parts = []
    for n in spec.parts:
        codes = rng.integers(0, 4, (spec.stages, len(spec.terms), n, spec.m)).astype(np.uint8)
        if code is not None:
            codes[:] = code
        rows, columns = tile_shape(spec.scale, n, spec.m)
        shape = (spec.stages, len(spec.terms), 2, -(-n // rows), -(-spec.m // columns))
        scales = rng.uniform(0.01, 0.03, shape) / 2.0 ** np.arange(spec.stages)[(..., *[None] * 4)]
        parts.append(
            PhaseTensor.from_codes(codes, scales.astype(np.float32), spec.terms, spec.scale)
        )
    return parts


def make_x(spec: PhaseSpec, batch=1, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 2 * spec.m)).astype(np.float32)


def codebook_tolerance(spec: PhaseSpec, parts, x, joint_limit: int | None) -> np.ndarray:
    """Bound on |y - reference|, (b, 2n), of the parts that a CPU's codebook kernel computes with.

    ``joint_limit`` is that of the joint tables, None without them.

    Let S be the sum of |x| times the scales that the codes select, which bounds every partial sum.
    A float32 sum of N products of three roundings each is off by at most (N + 3) eps S; products
    are one per flush (128 or 64 columns), unit and half of x, and fewer of combined units. The
    scales of dequantised x and of the joint units are rounded once more, and the reference's
    weights once a stage, so at most 8 eps S. A joint table moves the weights of a pair of stages,
    or those of U and W of a single one, by sqrt(2) error |(s1, s2)|.
    """
    rounded = dequantize_activations(*quantize_activations(x, act=spec.act))
    a, b = np.split(np.abs(rounded), 2, axis=1)
    flushes = -(-spec.m // 128) * (2 if spec.scale == "tile64" else 1)
    products = flushes * len(spec.terms) * spec.stages * 2 * 2
    bounds = []
    for part in parts:
        rows, columns = tile_shape(spec.scale, part.n, part.m)
        largest = part.scales.max(axis=2).sum(axis=(0, 1))  # no axis of any code exceeds it
        largest = np.kron(largest, np.ones((rows, columns)))[: part.n, : part.m]
        bound = (products + 11) * 2.0**-24 * ((a + b) @ largest.T)
        if joint_limit is not None:
            error = np.sqrt(2) * joint_ratio_error([part], joint_limit)
            scales = part.scales[: part.stages // 2 * 2, :, :, 0, 0]
            pairs = np.hypot(scales[::2], scales[1::2])
            if part.stages == 1:
                pairs = np.hypot(*part.scales[0, :, :, 0, 0])[None, None]
            bound = bound + error * pairs.max(axis=2).sum() * (a + b).sum(axis=1, keepdims=True)
        bounds += [bound, bound]
    return np.concatenate(bounds, axis=1)
