"""Random weights and activations for the kernels of every CPU family."""

from __future__ import annotations

import numpy as np

from fairy_compile.op import PhaseSpec
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
