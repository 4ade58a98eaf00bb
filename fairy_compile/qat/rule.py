"""The published phase rule in PyTorch, equal to `fairy_compile.phase` code for code.

Sectors are decided by comparisons, since PyTorch's vectorised arctangent is off by one step at
sector edges. Scale means are float64 sums rounded to float32, as in `phase.quantize`. The order of
the sums differs, which leaves a scale the same unless a mean lies within some 1e-15 of a tie
between two float32 numbers, about once in thirty million scales. Devices without float64 (Apple's
MPS) sum in float32; there scales may differ in their last bits.
"""

from __future__ import annotations

import torch

from fairy_compile.config import Granularity
from fairy_compile.phase.quantize import FAIRY2I_MIN_SCALE, IFAIRY_MIN_SCALE
from fairy_compile.phase.tensor import tile_shape

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]  # (re, im)


def phase_codes(re: Tensor, im: Tensor) -> Tensor:
    """Return the phase code (uint8, 0..3) of each re + i im; see `phase.quantize.phase_codes`."""
    plus_one, plus_i, minus_one, _ = _sectors(re, im)
    # 3 - 3 a - 2 b - c with one of a, b, c set, or none.
    return 3 - 3 * plus_one.to(torch.uint8) - 2 * plus_i.to(torch.uint8) - minus_one.to(torch.uint8)


def _sectors(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the masks of codes 0, 1, 2, 3."""
    above = im > re
    beyond = im > -re
    plus_i = (im >= re) & beyond
    minus_one = above & ~beyond
    minus_i = ~above & (im < -re)
    return ~(plus_i | minus_one | minus_i), plus_i, minus_one, minus_i


def _tile_sums(values: Tensor, tile: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sum (..., n, m) over tiles -> (..., n_tiles, m_tiles); edge tiles may be smaller."""
    n, m = values.shape[-2:]
    rows, columns = tile
    if (rows, columns) == (n, m):
        return values.sum(dim=(-2, -1), keepdim=True, dtype=dtype)
    if (rows, columns) == (1, m):
        return values.sum(dim=-1, keepdim=True, dtype=dtype)
    padded = torch.nn.functional.pad(values, (0, -m % columns, 0, -n % rows))
    n_tiles, m_tiles = padded.shape[-2] // rows, padded.shape[-1] // columns
    tiles = padded.reshape(*values.shape[:-2], n_tiles, rows, m_tiles, columns)
    return tiles.sum(dim=(-3, -1), dtype=dtype)


def _spread(scales: Tensor, tile: tuple[int, int], n: int, m: int) -> Tensor:
    """Repeat per-tile scales so that they broadcast over (..., n, m)."""
    if scales.shape[-2] > 1 and tile[0] > 1:
        scales = scales.repeat_interleave(tile[0], dim=-2)[..., :n, :]
    if scales.shape[-1] > 1 and tile[1] > 1:
        scales = scales.repeat_interleave(tile[1], dim=-1)[..., :m]
    return scales


def _stage(re: Tensor, im: Tensor, tile: tuple[int, int], min_scale: float) -> tuple[Pair, Pair]:
    """Return one stage of float32 matrices: their values (re, im) and their scales (re, im)."""
    wide = torch.float32 if re.device.type == "mps" else torch.float64
    plus_one, plus_i, minus_one, minus_i = _sectors(re, im)
    values, scales = [], []
    for part, plus, minus in ((re, plus_one, minus_one), (im, plus_i, minus_i)):
        mine = plus | minus
        sums = _tile_sums(part.abs() * mine, tile, wide)
        counts = _tile_sums(mine, tile, wide).clamp(min=1)  # the sum of an empty set is 0
        scale = (sums / counts).float().clamp(min=min_scale)
        sign = plus.to(part.dtype) - minus.to(part.dtype)
        values.append(sign * _spread(scale, tile, *part.shape[-2:]))
        scales.append(scale)
    return (values[0], values[1]), (scales[0], scales[1])


def quantize_complex(
    re: Tensor, im: Tensor, stages: int, scale: Granularity, min_scale: float
) -> Pair:
    """Return the sum (re, im) of T residual stages of complex matrices.

    Args:
        re: float32 (..., n, m), real parts; every matrix has scales of its own.
        im: float32 (..., n, m), imaginary parts.
        stages: T >= 1.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale.

    Returns:
        float32 (..., n, m) twice: what `PhaseTensor.dequantize_terms` gives for the same weights.
    """
    tile = tile_shape(scale, *re.shape[-2:])
    total_re = total_im = None
    for t in range(stages):
        (value_re, value_im), _ = _stage(re, im, tile, min_scale)
        total_re = value_re if total_re is None else total_re + value_re
        total_im = value_im if total_im is None else total_im + value_im
        if t + 1 < stages:
            re, im = re - value_re, im - value_im
    return total_re, total_im


def codes_and_scales(
    re: Tensor, im: Tensor, stages: int, scale: Granularity, min_scale: float
) -> tuple[Tensor, Tensor]:
    """Return codes uint8 (T, n, m) and scales float32 (T, 2, n_tiles, m_tiles) of a matrix."""
    tile = tile_shape(scale, *re.shape)
    codes, scales = [], []
    for _ in range(stages):
        codes.append(phase_codes(re, im))
        values, pair = _stage(re, im, tile, min_scale)
        scales.append(torch.stack(pair))
        re, im = re - values[0], im - values[1]
    return torch.stack(codes), torch.stack(scales)


def to_widely_linear(weight: Tensor) -> tuple[Pair, Pair]:
    """Split a real float32 (..., 2n, 2m) into U and W; see `phase.widely_linear`."""
    n, m = weight.shape[-2] // 2, weight.shape[-1] // 2
    upper, lower = weight[..., :n, :], weight[..., n:, :]
    a11, a12, a21, a22 = upper[..., :m], upper[..., m:], lower[..., :m], lower[..., m:]
    return ((a11 + a22) * 0.5, (a21 - a12) * 0.5), ((a11 - a22) * 0.5, (a12 + a21) * 0.5)


def from_widely_linear(u: Pair, w: Pair) -> Tensor:
    """Join U and W into the real float32 (..., 2n, 2m) they stand for."""
    (u_re, u_im), (w_re, w_im) = u, w
    upper = torch.cat([u_re + w_re, w_im - u_im], dim=-1)
    lower = torch.cat([u_im + w_im, u_re - w_re], dim=-1)
    return torch.cat([upper, lower], dim=-2)


class _StraightThroughReal(torch.autograd.Function):
    """Real weight -> its quantised value; the gradient passes unchanged.

    Straight-through means dL/dU = dL/dU' and dL/dW = dL/dW' for the quantised U', W'. As
    A -> (U, W) is inverted by (U', W') -> A', the same gradient reaches A: dL/dA = dL/dA'.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        weight: Tensor,
        stages: int,
        scale: Granularity,
        min_scale: float,
    ) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            u, w = to_widely_linear(weight.float())
            quantised = from_widely_linear(
                quantize_complex(*u, stages, scale, min_scale),
                quantize_complex(*w, stages, scale, min_scale),
            )
            return quantised.to(weight.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


class _StraightThroughComplex(torch.autograd.Function):
    """(re, im) of a complex weight -> their quantised values; gradients pass unchanged."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        re: Tensor,
        im: Tensor,
        stages: int,
        scale: Granularity,
        min_scale: float,
    ) -> Pair:
        with torch.autocast(re.device.type, enabled=False):
            pair = quantize_complex(re.float(), im.float(), stages, scale, min_scale)
            return pair[0].to(re.dtype), pair[1].to(im.dtype)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_re: Tensor, grad_im: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        return grad_re, grad_im, None, None, None


class _StraightThroughInt8(torch.autograd.Function):
    """Activations rounded to int8 a token, in their own dtype; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        wide = x.float()
        peak = wide.abs().amax(dim=-1, keepdim=True).clamp(min=IFAIRY_MIN_SCALE)
        inverse = peak.reciprocal() * 127
        return ((wide * inverse).round() / inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad


def quantized_weight(
    weight: Tensor, stages: int, scale: Granularity, min_scale: float = FAIRY2I_MIN_SCALE
) -> Tensor:
    """Return the phase-quantised value of real weights, straight-through in the backward pass.

    Args:
        weight: real (..., 2n, 2m), float32, bfloat16 or float16; quantised in float32, every
            matrix for itself.
        stages: T.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale.

    Returns:
        (..., 2n, 2m) in the dtype of ``weight``.
    """
    return _StraightThroughReal.apply(weight, stages, scale, min_scale)


def quantized_complex_weight(
    re: Tensor,
    im: Tensor,
    stages: int,
    scale: Granularity,
    min_scale: float = IFAIRY_MIN_SCALE,
) -> Pair:
    """Return the quantised (re, im) of a complex weight (n, m), straight-through backward."""
    return _StraightThroughComplex.apply(re, im, stages, scale, min_scale)


def int8_activations(x: Tensor) -> Tensor:
    """Round (..., m) to 1/127 of the largest magnitude of each row (iFairy), straight-through.

    Equal to `op.token_int8.round_tokens` bit for bit.

    Args:
        x: real or imaginary parts of activations, each rounded with a scale of its own.
    """
    return _StraightThroughInt8.apply(x)
