"""Images of x on CUDA: rows as the integers that `cuda_source/decode.cuh` multiplies by.

A kernel that computes x may write one, so that not every block that decodes has to quantise all of
x again. `cuda_source/quantize.cuh` defines its form.
"""

from __future__ import annotations

import math

import numpy as np

from fairy_compile.kernels.cuda_layout import BLOCK
from fairy_compile.op import ACT_GROUP, ACT_LEVELS, quantize_activations


def serves(size: int) -> bool:
    """Tell whether an element-wise kernel may write images of rows of ``size`` real numbers.

    Both halves, real and imaginary parts, must be whole groups of columns.
    """
    return size % (2 * ACT_GROUP) == 0


def image_bytes(m: int, act: str) -> int:
    """Return the size of the image of a row of m complex numbers."""
    return math.ceil(m / ACT_GROUP) * record_bytes(act)


def digits(act: str) -> int:
    """Return the bytes of a quantised complex number."""
    return 4 if ACT_LEVELS[act] > 127 else 2


def record_bytes(act: str) -> int:
    """Return the size of ``Record``: a group of complex columns of a row."""
    return ACT_GROUP * digits(act) + 32


def make_image(x: np.ndarray, act: str) -> np.ndarray:
    """Return the image of rows: float (b, 2m) -> uint8 (b, image_bytes(m, act)).

    What kernels write, but for the eight bytes at the end of a record, which are 0 here.
    """
    q, scale = quantize_activations(x.astype(np.float32), act=act)
    rows, _, m = q.shape
    groups, own = math.ceil(m / ACT_GROUP), digits(act) // 2
    padded = np.zeros((rows, 2, groups * ACT_GROUP), np.int32)
    padded[:, :, :m] = q
    high = (padded + 128) >> 8
    by_digit = np.stack([high, padded - 256 * high] if own == 2 else [padded], axis=2)
    columns = by_digit.astype(np.int8).reshape(rows, 2 * own, groups, ACT_GROUP // BLOCK, BLOCK)
    sums = padded.reshape(rows, 2, groups, 2, ACT_GROUP // 2).sum(axis=-1, dtype=np.int32)
    record = np.dtype(
        [
            ("values", np.int8, (ACT_GROUP // BLOCK, 2 * own, BLOCK)),
            ("scale", np.float32, (2,)),
            ("sums", np.int32, (2, 2)),
            ("unused", np.int32, (2,)),
        ]
    )
    image = np.zeros((rows, groups), record)
    image["values"] = columns.transpose(0, 2, 3, 1, 4)
    image["scale"] = scale.transpose(0, 2, 1)
    image["sums"] = sums.transpose(0, 2, 3, 1)
    return image.view(np.uint8).reshape(rows, -1)
