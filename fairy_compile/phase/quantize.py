"""Phase quantisation of complex matrices: the published rule, stage by stage.

Codes are quarter turns: 0 is +1, 1 is +i, 2 is -1, 3 is -i. A weight takes the code of the sector
its angle lies in; each sector owns its lower edge (Fairy2i and iFairy reference rule):

    code 0: [-pi/4, pi/4)   code 1: [pi/4, 3pi/4)   code 3: [-3pi/4, -pi/4)   code 2: the rest

and zero has angle 0, so code 0. The comparisons below decide the same question exactly, without
computing an angle. Scales are means: s_re of |Re w| over codes 0 and 2, s_im of |Im w| over codes 1
and 3, 0 where no weight has such a code, then clamped from below. Later stages quantise what the
stages before left over.

An implementation that computes float32 angles differs only within their rounding of an edge: about
one weight in ten million. One kind of edge is not rare, though: weights exactly on +pi/4, some
0.5 % where weights have few bits (bfloat16 checkpoints). A correctly rounded arctangent agrees with
the rule there; PyTorch's vectorised one (AVX2, AVX512) returns one step less and so code 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any, Literal

import numpy as np

from fairy_compile.config import QUANTS, Granularity, QuantConfig, check_choice, is_whole
from fairy_compile.errors import FairyError
from fairy_compile.phase.tensor import PhaseTensor, spread_scales, tile_shape
from fairy_compile.phase.widely_linear import as_float32, to_widely_linear

FAIRY2I_MIN_SCALE = 1e-6
IFAIRY_MIN_SCALE = 1e-5

LARGEST = float(np.finfo(np.float32).max) / 2
"""The largest real weight: the widely-linear form adds two of them."""

# Rows are processed in blocks of about this many weights, so that the dozen passes over a block
# stay in the second-level cache.
_BLOCK_WEIGHTS = 1 << 16


def phase_codes(re: np.ndarray, im: np.ndarray) -> np.ndarray:
    """Return the phase code (uint8, 0..3) of each complex number re + i im, elementwise.

    Exact at the sector edges: +pi/4 is code 1, -pi/4 is 0, 3pi/4 is 2, -3pi/4 is 3, zero is 0.
    """
    above = im > re
    beyond = im > -re
    is_plus_i = (im >= re) & beyond
    is_minus_one = above & ~beyond
    is_minus_i = ~above & (im < -re)
    codes = is_plus_i.view(np.uint8) | (is_minus_one.view(np.uint8) << 1)
    codes |= is_minus_i.view(np.uint8) * np.uint8(3)
    return codes


def _tile_sums(values: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Sum (n, m) over tiles in float64 -> (n_tiles, m_tiles); edge tiles may be smaller."""
    row_starts = np.arange(0, values.shape[0], tile[0])
    if tile[1] >= values.shape[1]:
        columns = values.sum(axis=1, dtype=np.float64)[:, None]
    else:
        starts = np.arange(0, values.shape[1], tile[1])
        columns = np.add.reduceat(values, starts, axis=1, dtype=np.float64)
    return np.add.reduceat(columns, row_starts, axis=0)


def _row_blocks(n: int, m: int, tile_rows: int, per_tensor: bool) -> list[slice]:
    rows = max(1, _BLOCK_WEIGHTS // m)
    if not per_tensor:
        rows = -(-rows // tile_rows) * tile_rows
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def quantize_complex(
    re: np.ndarray,
    im: np.ndarray,
    stages: int,
    scale: Granularity = "tensor",
    min_scale: float = FAIRY2I_MIN_SCALE,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise one complex matrix by the residual phase rule.

    Args:
        re: float32 (n, m), real parts.
        im: float32 (n, m), imaginary parts.
        stages: T >= 1, number of residual stages.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale (Fairy2i 1e-6, iFairy 1e-5).

    Returns:
        codes uint8 (T, n, m) and scales float32 (T, 2, n_tiles, m_tiles), axis 1 being (re, im).
    """
    n, m = re.shape
    tile = tile_shape(scale, n, m)
    blocks = _row_blocks(n, m, tile[0], per_tensor=scale == "tensor")
    res_re, res_im = np.array(re, np.float32), np.array(im, np.float32)
    codes = np.empty((stages, n, m), np.uint8)
    tiles = (-(-n // tile[0]), -(-m // tile[1]))
    scales = np.empty((stages, 2, *tiles), np.float32)
    for t in range(stages):
        sums = np.zeros((3, *tiles))  # sum |re| on the real axis, sum |im|, count real axis
        for rows in blocks:
            code = phase_codes(res_re[rows], res_im[rows])
            codes[t, rows] = code
            on_imag = code & 1
            on_real = on_imag ^ 1
            parts = (np.abs(res_re[rows]) * on_real, np.abs(res_im[rows]) * on_imag, on_real)
            first = rows.start // tile[0]
            for k, values in enumerate(parts):
                part = _tile_sums(values, tile)
                sums[k, first : first + part.shape[0]] += part
        sizes = _tile_sums(np.ones((n, 1), np.float32), (tile[0], 1)) * np.diff(
            [*range(0, m, tile[1]), m]
        )
        counts = np.stack([sums[2], sizes - sums[2]])
        means = np.divide(sums[:2], counts, out=np.zeros_like(counts), where=counts > 0)
        scales[t] = np.maximum(means.astype(np.float32), np.float32(min_scale))
        if t + 1 < stages:
            for rows in blocks:
                _subtract_stage(res_re, res_im, codes[t], scales[t], tile, rows)
    return codes, scales


def _subtract_stage(
    res_re: np.ndarray,
    res_im: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    tile: tuple[int, int],
    rows: slice,
) -> None:
    """Take one stage's value off the residual, in place, for a block of rows."""
    code = codes[rows]
    first, last = rows.start // tile[0], -(-rows.stop // tile[0])
    sign = np.float32(1) - (code & 2).astype(np.float32)
    on_imag = (code & 1).astype(np.float32)
    shape = code.shape
    block = scales[:, first:last]
    res_im[rows] -= sign * on_imag * spread_scales(block[1], tile, *shape)
    res_re[rows] -= sign * (np.float32(1) - on_imag) * spread_scales(block[0], tile, *shape)


def check_finite(weight: np.ndarray, name: str = "weight") -> None:
    """Raise `FairyError` with the first bad position if ``weight`` holds a NaN or infinity."""
    # A float32 sum is finite for finite weights of any sane model; look closer only if not.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(weight.sum(dtype=np.float64)):
            return
        bad = np.argwhere(~np.isfinite(weight))
    where = tuple(int(i) for i in bad[0])
    raise FairyError(
        f"{name} holds {len(bad)} non-finite values, the first at {where}: "
        f"{weight[where]}; the checkpoint is damaged or its training diverged"
    )


def check_range(weight: np.ndarray, name: str = "weight") -> None:
    """Raise `FairyError` for finite weights of which the sum of two is beyond float32."""
    largest = max(abs(float(weight.max(initial=0))), abs(float(weight.min(initial=0))))
    if LARGEST < largest < np.inf:
        where = tuple(int(i) for i in np.argwhere(np.abs(weight) > LARGEST)[0])
        raise FairyError(
            f"{name} holds {float(weight[where]):.4g} at {where}; allowed: up to {LARGEST:.4g}, "
            "half of the range of float32, since phase codes stand for sums of two weights; the "
            "checkpoint is damaged or its training diverged"
        )


def quantize(
    weight: Any,
    quant: str | QuantConfig | int = "w2",
    *,
    scale: Granularity | None = None,
    method: Literal["phase", "alternating"] = "phase",
    min_scale: float = FAIRY2I_MIN_SCALE,
    name: str = "weight",
) -> PhaseTensor:
    """Quantise a real weight matrix to its widely-linear phase form.

    Args:
        weight: real (2n, 2m), NumPy or torch, any float dtype; computed in float32.
        quant: ``"w1"`` .. ``"w4"``, the number of stages T itself, or a whole `QuantConfig`.
        scale: granularity; overrides the config's.
        method: ``"phase"`` is the published rule, and what master weights of quantisation-aware
            training need; ``"alternating"`` fits codes and scales to each other, which serves
            weights that were never trained for the rule better. The config's method is not read:
            it speaks of whole models.
        min_scale: lower clamp of every scale.
        name: how errors call the weight; also picks per-layer T from a config.

    Returns:
        `PhaseTensor` with terms ("U", "W") and float32 scales.

    Raises:
        FairyError: odd dimensions, non-finite or too large values or unknown names.
    """
    if is_whole(quant):
        quant = f"w{quant}"
    config = quant if isinstance(quant, QuantConfig) else QuantConfig(quant)
    if config.terms != ("U", "W"):
        raise FairyError(
            f"{name} is a real matrix, which needs terms ('U', 'W'); got {config.terms}; complex "
            "matrices go through quantize_complex_layer"
        )
    stages = config.stages(name) if isinstance(quant, QuantConfig) else QUANTS[config.quant]
    granularity = config.scale if scale is None else scale
    check_choice("method for a single weight", method, ["phase", "alternating"])
    if not (isinstance(min_scale, Real) and 0 < min_scale < np.inf):
        raise FairyError(f"min_scale is {min_scale!r:.80}; allowed: above 0, finite")
    real = as_float32(weight)
    check_finite(real, name)
    check_range(real, name)
    pair = to_widely_linear(real)
    if method == "alternating":
        from fairy_compile.phase.alternating import quantize_alternating  # builds on this module

        results = [quantize_alternating(*z, stages, granularity, min_scale) for z in pair]
    else:
        # NumPy lets go of the interpreter lock inside its loops: the terms run side by side.
        with ThreadPoolExecutor(2) as pool:
            results = list(
                pool.map(lambda z: quantize_complex(*z, stages, granularity, min_scale), pair)
            )
    codes = np.stack([r[0] for r in results], axis=1)
    scales = np.stack([r[1] for r in results], axis=1)
    return PhaseTensor.from_codes(codes, scales, terms=("U", "W"), scale=granularity)


def quantize_complex_layer(
    re: Any,
    im: Any,
    stages: int = 1,
    *,
    scale: Granularity = "tensor",
    min_scale: float = IFAIRY_MIN_SCALE,
) -> PhaseTensor:
    """Quantise a natively complex layer y = w conj(x) (iFairy) to a ``("W",)`` `PhaseTensor`.

    Args:
        re: real parts (n, m), NumPy or torch.
        im: imaginary parts (n, m).
        stages: T.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale.
    """
    re, im = as_float32(re), as_float32(im)
    if re.shape != im.shape or re.ndim != 2:
        raise FairyError(f"real and imaginary parts differ in shape: {re.shape} and {im.shape}")
    check_finite(re, "real part")
    check_finite(im, "imaginary part")
    codes, scales = quantize_complex(re, im, stages, scale, min_scale)
    return PhaseTensor.from_codes(codes[:, None], scales[:, None], terms=("W",), scale=scale)
