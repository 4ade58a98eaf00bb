"""NumPy reference of the phase GEMM and of its activation contracts.

Every kernel is compared with `phase_gemm_reference`; the int8 contract is defined here, by
`quantize_activations`, and kernels reproduce it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairy_compile.config import ActContract
from fairy_compile.phase import PhaseTensor

ACT_GROUP = 128


def quantize_activations(x: np.ndarray, group: int = ACT_GROUP) -> tuple[np.ndarray, np.ndarray]:
    """Quantise activations to int8 in groups of complex columns.

    The real half x[:, :m] and the imaginary half x[:, m:] are grouped separately; the last group
    of a half may be short. With a = max |x| of a group: scale = a / 127 (float32),
    q = rint(x * (127 / a)), ties to even; a group of zeros has scale 0 and q = 0.

    Args:
        x: float32 (batch, 2m).
        group: columns in a group.

    Returns:
        q int8 (batch, 2, m) and scales float32 (batch, 2, ceil(m / group)).
    """
    batch, m = x.shape[0], x.shape[1] // 2
    groups = -(-m // group)
    padded = np.zeros((batch, 2, groups * group), np.float32)
    padded[:, :, :m] = x.astype(np.float32).reshape(batch, 2, m)
    tiles = padded.reshape(batch, 2, groups, group)
    peak = np.abs(tiles).max(axis=-1)
    scale = peak * np.float32(1 / 127)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    q = np.rint(tiles * inverse[..., None]).astype(np.int8)
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
        act: ``int8`` applies the int8 contract to x first.

    Returns:
        float64 (batch, sum of 2n_p).
    """
    if act == "int8":
        x = dequantize_activations(*quantize_activations(x))
    x64 = x.astype(np.float64)
    return np.concatenate([x64 @ p.dequantize().astype(np.float64).T for p in parts], axis=1)
