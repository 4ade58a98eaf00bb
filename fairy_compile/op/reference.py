"""NumPy reference of the phase GEMM and of its activation contracts.

Every kernel is compared with `phase_gemm_reference`; the int8 and int16 contracts are defined here,
by `quantize_activations`, and kernels reproduce them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairy_compile.config import ActContract
from fairy_compile.phase import PhaseTensor

ACT_GROUP = 128

ACT_LEVELS: dict[ActContract, int] = {"int8": 127, "int16": 127 * 256 + 127}
"""Largest |q| of the contracts that quantise. The levels of int16 are those of two signed bytes:
q = 256 hi + lo, with hi in -127..127 and lo in -128..127, so that kernels compute it with byte dot
products."""


def quantize_activations(
    x: np.ndarray, group: int = ACT_GROUP, act: ActContract = "int8"
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise activations in groups of complex columns.

    The real half x[:, :m] and the imaginary half x[:, m:] are grouped separately; the last group
    of a half may be short. With a = max |x| of a group and L the contract's `ACT_LEVELS`:
    scale = a * (1 / L), q = rint(x * (L / a)), ties to even, in float32; a group of zeros has
    scale 0 and q = 0.

    A value is off by at most a / (2 L), and a product with independent weights by
    (a / rms x) / (L sqrt(12)) relative to its size, with a / rms x <= sqrt(128): at most 2.6e-2 for
    int8 and 1.0e-4 for int16; for gaussian activations (a = 2.7 rms) 6e-3 and 2.4e-5.

    Args:
        x: float32 (batch, 2m).
        group: columns in a group.
        act: ``int8`` or ``int16``.

    Returns:
        q int8 or int16 (batch, 2, m) and scales float32 (batch, 2, ceil(m / group)).
    """
    levels = np.float32(ACT_LEVELS[act])
    batch, m = x.shape[0], x.shape[1] // 2
    groups = -(-m // group)
    padded = np.zeros((batch, 2, groups * group), np.float32)
    padded[:, :, :m] = x.astype(np.float32).reshape(batch, 2, m)
    tiles = padded.reshape(batch, 2, groups, group)
    peak = np.abs(tiles).max(axis=-1)
    scale = peak * np.float32(1 / ACT_LEVELS[act])
    inverse = np.divide(levels, peak, out=np.zeros_like(peak), where=peak > 0)
    q = np.rint(tiles * inverse[..., None]).astype(act)
    return q.reshape(batch, 2, -1)[:, :, :m], scale


def dequantize_activations(q: np.ndarray, scale: np.ndarray, group: int = ACT_GROUP) -> np.ndarray:
    """Undo `quantize_activations` up to its rounding: -> float32 (batch, 2m)."""
    spread = np.repeat(scale, group, axis=-1)[..., : q.shape[-1]]
    return (q * spread).reshape(q.shape[0], -1).astype(np.float32)


def phase_gemm_reference(
    x: np.ndarray, parts: Sequence[PhaseTensor], act: ActContract = "float"
) -> np.ndarray:
    """Compute y = concat_p(x A_p^T) in float64, A_p being part p's real matrix.

    Args:
        x: float32 (batch, 2m).
        parts: the fused layers, all with 2m inputs.
        act: ``int8`` and ``int16`` apply that contract to x first.

    Returns:
        float64 (batch, sum of 2n_p).
    """
    if act != "float":
        x = dequantize_activations(*quantize_activations(x, act=act))
    x64 = x.astype(np.float64)
    return np.concatenate([x64 @ p.dequantize().astype(np.float64).T for p in parts], axis=1)
