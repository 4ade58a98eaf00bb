"""Inputs for the ARM kernels, and how far from the reference their outputs may be."""

from __future__ import annotations

import numpy as np

from fairy_compile.kernels.arm import TableMode
from fairy_compile.kernels.arm_layout import JOINT_LIMIT
from fairy_compile.kernels.arm_tables import combined_weights
from fairy_compile.kernels.x86_tables import joint_ratio_error
from fairy_compile.op import PhaseSpec, dequantize_activations, quantize_activations
from fairy_compile.phase import PhaseTensor, tile_shape


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


def tolerance(spec: PhaseSpec, parts, x, joint: bool) -> np.ndarray:
    """Bound on |y - reference|, (b, 2n), of the parts that the kernel computes with.

    Let S be the sum of |x| times the scales that the codes select, which bounds every partial sum.
    A float32 sum of N products of three roundings each is off by at most (N + 3) eps S; products
    are one per flush (128 or 64 columns), unit and half of x, and fewer of combined units. The
    scales of dequantised x and of the joint units are rounded once more, and the reference's
    weights once a stage, so at most 8 eps S. A joint table moves the weights of a pair of stages by
    sqrt(2) error |(s1, s2)|.
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
        if joint:
            error = np.sqrt(2) * joint_ratio_error([part], JOINT_LIMIT)
            scales = part.scales[: part.stages // 2 * 2, :, :, 0, 0]
            pairs = np.hypot(scales[::2], scales[1::2])
            bound = bound + error * pairs.max(axis=2).sum() * (a + b).sum(axis=1, keepdims=True)
        bounds += [bound, bound]
    return np.concatenate(bounds, axis=1)
