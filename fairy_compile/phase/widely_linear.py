"""The widely-linear form of a real matrix, both ways.

A real map A of shape (2n, 2m) with blocks A11 A12 / A21 A22 of shape (n, m), acting on
x = [Re z; Im z], is the same function as y = U z + W conj(z) with

    U = (A11 + A22)/2 + i (A21 - A12)/2        W = (A11 - A22)/2 + i (A12 + A21)/2

(Fairy2i, arXiv 2512.02901, equations of the widely-linear transformation). Complex matrices are
pairs of real arrays here, (re, im), which is what the quantiser and the packers work on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fairy_compile.errors import FairyError


def as_float32(weight: Any) -> np.ndarray:
    """Return a NumPy float32 view or copy of a NumPy array or torch tensor.

    torch is recognised by its methods and never imported. float64 is rounded to float32; the
    quantisation rule is defined on float32 values.

    Raises:
        FairyError: it holds no real numbers.
    """
    seen = f"of dtype {weight.dtype}" if hasattr(weight, "dtype") else f"{weight!r:.80}"
    refusal = f"the weight is {seen}; allowed: real numbers, in a NumPy array or a torch tensor"
    try:
        if hasattr(weight, "detach") and not weight.is_complex():
            weight = weight.detach().to("cpu").float().numpy()
        array = np.asarray(weight)
    except (ValueError, TypeError, RuntimeError) as error:  # sparse and meta tensors, uneven rows
        raise FairyError(f"{refusal}: {error}") from error
    registered = array.dtype.isbuiltin == 2  # bfloat16 of ml_dtypes
    if array.dtype.kind not in "fiub" and not registered:
        raise FairyError(refusal)
    with np.errstate(over="ignore"):  # callers refuse infinities, by name
        return np.asarray(array, dtype=np.float32)


def to_widely_linear(
    weight: Any,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Split a real matrix into its widely-linear pair.

    Args:
        weight: real (2n, 2m), NumPy or torch.

    Returns:
        ``((U.re, U.im), (W.re, W.im))``, each float32 (n, m). Sums are formed in float32; they
        are exact whenever the weights have at most 23 significant bits in a common exponent
        range, which float16 and bfloat16 checkpoints do up to the rounding of one addition.

    Raises:
        FairyError: the matrix is not two-dimensional or has an odd dimension.
    """
    a = as_float32(weight)
    if a.ndim != 2 or a.shape[0] % 2 or a.shape[1] % 2 or 0 in a.shape:
        raise FairyError(
            f"a weight of shape {a.shape} has no complex form; both dimensions must be even"
        )
    n, m = a.shape[0] // 2, a.shape[1] // 2
    a11, a12, a21, a22 = a[:n, :m], a[:n, m:], a[n:, :m], a[n:, m:]
    half = np.float32(0.5)
    u = ((a11 + a22) * half, (a21 - a12) * half)
    w = ((a11 - a22) * half, (a12 + a21) * half)
    return u, w


def from_widely_linear(
    u: tuple[np.ndarray, np.ndarray], w: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Join a widely-linear pair into the real matrix (2n, 2m) it stands for.

    A11 = Re U + Re W, A12 = Im W - Im U, A21 = Im U + Im W, A22 = Re U - Re W.

    Args:
        u: (re, im) of U, each (n, m).
        w: (re, im) of W, each (n, m).
    """
    (u_re, u_im), (w_re, w_im) = u, w
    return np.block([[u_re + w_re, w_im - u_im], [u_im + w_im, u_re - w_re]])
