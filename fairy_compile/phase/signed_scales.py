"""Phase codes with scales of any sign, such as training finds where it learns them."""

from __future__ import annotations

import numpy as np

from fairy_compile.phase.quantize import FAIRY2I_MIN_SCALE
from fairy_compile.phase.tensor import TILE, PhaseTensor


def with_signed_scales(codes: np.ndarray, scales: np.ndarray) -> PhaseTensor:
    """Return a `PhaseTensor` of scales that may be negative or zero, as learned ones may.

    A negative scale turns the codes of its axis by half a turn. A scale of zero becomes the least
    there is, 1e-6, since scales of a `PhaseTensor` are positive.

    Args:
        codes: packed, uint8 (T, 2, n, m/4), n and m multiples of 64.
        scales: float32 (T, 2, 2, n/64, m/64), axis 2 being (re, im).
    """
    negative = scales < 0
    if negative.any():
        # A code's lower bit tells its axis, its upper one its sign.
        axis = codes & np.uint8(0b01010101)
        real, imaginary = (
            np.repeat(np.repeat(part, TILE, axis=-2), TILE // 4, axis=-1)
            for part in (negative[:, :, 0], negative[:, :, 1])
        )
        turned = np.where(imaginary, axis, 0) | np.where(real, axis ^ np.uint8(0b01010101), 0)
        codes = codes ^ (turned.astype(np.uint8) << 1)
    positive = np.maximum(np.abs(scales), np.float32(FAIRY2I_MIN_SCALE))
    n, m = codes.shape[2], codes.shape[3] * 4
    packed = np.ascontiguousarray(codes)
    return PhaseTensor(packed, np.ascontiguousarray(positive), n, m, ("U", "W"), "tile64")
