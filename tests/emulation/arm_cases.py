"""Inputs for the ARM kernels, and how far from the reference their outputs may be."""

from __future__ import annotations

import numpy as np

from fairy_compile.kernels.arm import TableMode
from fairy_compile.kernels.arm_layout import JOINT_LIMIT
from fairy_compile.kernels.arm_tables import combined_weights
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor
from tests.kernels.cases import codebook_tolerance


def computed(parts: list[PhaseTensor], mode: TableMode, terms: int) -> list[PhaseTensor]:
    """Return the parts that a kernel computes with: combined tables replace scales."""
    if mode != "combined":
        return parts
    replaced = []
    for part in parts:
        weights, units, _ = combined_weights(part, terms)
        scales = (weights * units)[..., None, None].astype(np.float32)
        replaced.append(PhaseTensor.from_codes(part.unpack(), scales, part.terms, part.scale))
    return replaced


def tolerance(
    spec: PhaseSpec, parts: list[PhaseTensor], x: np.ndarray, mode: TableMode
) -> np.ndarray:
    """Bound on |y - reference|, (b, 2n), of the parts that `computed` returns."""
    return codebook_tolerance(spec, parts, x, JOINT_LIMIT if mode == "joint" else None)
