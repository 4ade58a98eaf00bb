"""iFairy's activation contract: int8 with a scale for each half, real and imaginary, of a token.

Kernels quantise activations in groups of `ACT_GROUP` columns, each to its own peak, and a value
rounded twice, by two scales, is another value. So that they reproduce this contract exactly, the
columns of a call are *guarded*: x is rounded before the call, and each group holds 126 of its
columns behind two guards,

    group:    guard   guard   126 columns
    x:          p      -p     rounded, all multiples of p / 127, at most p
    code:       0       0     as they were

with p the token's peak in this half of x. A group's peak is then p, its scale p / 127, and what the
kernel rounds is an integer already, up to float rounding. The guards meet equal weights with
opposite signs and add nothing, exactly, since sums within a group are those of integers.

It costs two columns in 128, and whole groups where that takes one more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fairy_compile.op.reference import ACT_GROUP
from fairy_compile.phase import PhaseTensor, pack_codes

LEVELS = 127
MIN_PEAK = 1e-5
GUARDS = 2
VALUES = ACT_GROUP - GUARDS


def round_tokens(x: np.ndarray) -> np.ndarray:
    """Round activations to int8 as iFairy does (arXiv 2508.05571 and its published code).

    For the real half and the imaginary half of each token: s = 127 (1 / max(max |x|, 1e-5)), and x
    becomes round(x s) / s, ties to even, in float32. The published code says 127 / ..., which
    PyTorch computes as a reciprocal and a product; a tie may depend on it.

    Args:
        x: (batch, 2m).

    Returns:
        float32 (batch, 2m).
    """
    rounded, _ = _round_halves(x)
    return rounded.reshape(x.shape)


def _round_halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 (batch, 2, m) rounded activations and (batch, 2, 1) peaks."""
    halves = x.astype(np.float32).reshape(len(x), 2, -1)
    peak = np.maximum(np.abs(halves).max(axis=-1, keepdims=True), np.float32(MIN_PEAK))
    s = np.float32(1) / peak * np.float32(LEVELS)
    return np.rint(halves * s) / s, peak


def guarded_columns(m: int) -> int:
    """Return the complex columns of a guarded call with m columns of its own."""
    return m + GUARDS * -(-m // VALUES)


def guarded_places(m: int) -> np.ndarray:
    """Return where each of m columns stands in a guarded call."""
    column = np.arange(m)
    return column // VALUES * ACT_GROUP + GUARDS + column % VALUES


def guard_activations(x: np.ndarray) -> np.ndarray:
    """Round activations and put the guards in: (batch, 2m) -> float32 (batch, 2 m guarded).

    The definition of what `models.token_int8` computes.
    """
    m = x.shape[1] // 2
    rounded, peak = _round_halves(x)
    guarded = np.zeros((len(x), 2, guarded_columns(m)), np.float32)
    guarded[:, :, ::ACT_GROUP] = peak
    guarded[:, :, 1::ACT_GROUP] = -peak
    guarded[:, :, guarded_places(m)] = rounded
    return guarded.reshape(len(x), -1)


def guard_weight(tensor: PhaseTensor) -> PhaseTensor:
    """Return a layer with guard columns, code 0, put in.

    Raises:
        ValueError: the scales are by tile, whose columns guards would move.
    """
    if tensor.scale == "tile64":
        raise ValueError("guards would move the columns of scale tiles")
    codes = tensor.unpack()
    guarded = np.zeros((*codes.shape[:-1], guarded_columns(tensor.m)), np.uint8)
    guarded[..., guarded_places(tensor.m)] = codes
    return replace(tensor, codes=pack_codes(guarded), m=guarded.shape[-1])
