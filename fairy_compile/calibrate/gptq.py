"""Error feedback for widely-linear layers: GPTQ without an approximation.

A layer's output error on calibration inputs x is the mean of |dA x|^2, which is the sum over its
real rows a of da G da^T with G = E[x x^T], real (2m, 2m). GPTQ (arXiv 2210.17323) quantises one
column after the other and corrects the columns to come for the error made, which needs nothing but
G's inverse Cholesky factor. Here the unit is a *pair* of real columns (j, m + j), because that is
where the complex entries U_ij and W_ij live: with the complex row p = A_i + i A_{n+i},

    U_ij = (p_j - i p_{m+j}) / 2,    W_ij = (p_j + i p_{m+j}) / 2,

and G, real as it is, acts on the complex row as on its two real ones. Within a pair U is quantised
first, and the target of W is moved by what U's error costs there. This equals complex GPTQ on the
rows [U_i, W_i] with the Hessian [[C, P], [conj P, conj C]] of z = [x; conj x], C = E[x x^H],
P = E[x x^T], at a quarter of the arithmetic.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from fairy_compile.calibrate.refit import refit_scales
from fairy_compile.config import Granularity
from fairy_compile.phase import PhaseTensor, quantize
from fairy_compile.phase.alternating import nearest_codes
from fairy_compile.phase.codebook import codebook
from fairy_compile.phase.tensor import TILE

DAMPING = 0.01
_BLOCK_PAIRS = 64
_MEASURED_ROWS = 4096


@dataclass(frozen=True)
class Solved:
    """A layer as codes and scales, and how far it is from the exact one.

    Attributes:
        tensor: its codes and scales.
        nmse: ||A - A'||^2 / ||A||^2 of the weight.
        output_error: E|(A - A') x|^2 / E|A x|^2 on the calibration inputs.
        plain: with one stage, the same codes with the published rule's scales.
    """

    tensor: PhaseTensor
    nmse: float
    output_error: float
    plain: Solved | None = None

    @classmethod
    def measure(cls, weight: np.ndarray, gram: torch.Tensor, tensor: PhaseTensor) -> Solved:
        """Measure a layer's phase form; arguments as those of `quantize_gptq`."""
        lost, power = _powers(weight, gram, tensor)
        return cls(tensor, *(float(part) for part in lost / power.clip(min=1e-30)))


def quantize_gptq(
    weight: np.ndarray,
    gram: torch.Tensor,
    stages: int,
    scale: Granularity = "tensor",
    *,
    damping: float = DAMPING,
) -> Solved:
    """Quantise a layer so that its outputs on calibration inputs change least.

    Scales come from the alternating method, codes from error feedback, and the scales are fitted
    once more to the codes under the Hessian. One stage (T = 1) keeps the published rule's codes,
    which feedback makes worse, and gets fitted scales only; see `calibrate.one_stage` for when
    they are worth having.

    Args:
        weight: float (2n, 2m).
        gram: float32 (2m, 2m), the mean of x x^T over calibration inputs; decides the device.
        stages: T.
        scale: granularity of the scales.
        damping: share of the mean diagonal that is added to the diagonal.
    """
    start = quantize(weight, stages, scale=scale, method="alternating")
    a = torch.from_numpy(np.array(weight, np.float32)).to(gram.device)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    if stages == 1 or not gram.any():
        codes = start.unpack()
    else:
        codes = _feedback(a, damped, start)
    tensor = refit_scales(
        a, damped, PhaseTensor.from_codes(codes, start.scales, start.terms, scale)
    )
    del a, damped
    solved = Solved.measure(weight, gram, tensor)
    if stages == 1:
        solved = dataclasses.replace(solved, plain=Solved.measure(weight, gram, start))
    return solved


def errors(a: torch.Tensor, gram: torch.Tensor, tensor: PhaseTensor) -> tuple[float, float]:
    """Return (nmse, output_error) as `Solved` has them.

    Args:
        a: float32 (2n, 2m), the exact weight.
        gram: float32 (2m, 2m).
        tensor: its phase form.
    """
    solved = Solved.measure(a.cpu().numpy(), gram, tensor)
    return solved.nmse, solved.output_error


def _powers(
    weight: np.ndarray, gram: torch.Tensor, tensor: PhaseTensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return the squares of A - A' and of A, float64 (2,) each: plain, and under the Gram matrix.

    Some rows at a time, since output heads are large.
    """
    out = np.zeros((2, 2))
    near = tensor.dequantize()
    for first in range(0, len(weight), _MEASURED_ROWS):
        rows = slice(first, first + _MEASURED_ROWS)
        exact = torch.from_numpy(np.array(weight[rows], np.float32)).to(gram.device)
        for k, part in enumerate((exact - torch.from_numpy(near[rows]).to(gram.device), exact)):
            out[k] += float(part.square().sum()), float(((part @ gram) * part).sum())
    return out[0], out[1]


def _inverse_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Return the upper R with R^T R = matrix^-1, damping more where rounding asks for it.

    With matrix = M M^T, M upper, R is M^-1, and M is the Cholesky factor of the matrix read
    backwards: half of the arithmetic of inverting first and factoring the inverse.
    """
    eye = torch.eye(len(matrix), device=matrix.device)
    more = 0.0
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex((matrix + more * eye).flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if upper.isfinite().all():
                return upper
        more = max(10 * more, 0.01 * float(matrix.diagonal().mean()))
    raise RuntimeError("the Hessian of a layer cannot be factored even with strong damping")


def _feedback(a: torch.Tensor, damped: torch.Tensor, start: PhaseTensor) -> np.ndarray:
    """Return codes uint8 (T, 2, n, m) chosen column pair by column pair.

    Args:
        a: float32 (2n, 2m).
        damped: float32 (2m, 2m).
        start: gives scales and their granularity.
    """
    n, m = start.n, start.m
    weights = damped.diagonal()
    order = torch.argsort(weights[:m] + weights[m:], descending=True, stable=True)
    pairs = torch.stack([order, order + m], dim=1).reshape(-1)  # j, m + j side by side
    factor = _inverse_factor(damped[pairs][:, pairs])
    rest = a[:, pairs].contiguous()
    targets = torch.empty((2, 2, m, n), device=a.device)  # term, (re, im)
    snap = _Nearest(start, a.device)
    columns = order.tolist()
    for first in range(0, m, _BLOCK_PAIRS):
        last = min(first + _BLOCK_PAIRS, m)
        own = rest[:, 2 * first : 2 * last].clone()
        spread = torch.zeros_like(own)
        for k in range(first, last):
            at = 2 * (k - first)
            corner = factor[2 * k : 2 * k + 2, 2 * k : 2 * k + 2]
            lost = _quantize_pair(own[:, at : at + 2], corner, columns[k], snap, targets)
            move = lost @ torch.linalg.inv(corner)
            spread[:, at : at + 2] = move
            own[:, at + 2 :] -= move @ factor[2 * k : 2 * k + 2, 2 * k + 2 : 2 * last]
        rest[:, 2 * last :] -= spread @ factor[2 * first : 2 * last, 2 * last :]
    found = targets.transpose(2, 3).cpu().numpy()
    terms = [
        nearest_codes(
            np.ascontiguousarray(re), np.ascontiguousarray(im), start.scales[:, k], start.scale
        )
        for k, (re, im) in enumerate(found)
    ]
    return np.stack(terms, axis=1)


def _quantize_pair(
    pair: torch.Tensor,
    corner: torch.Tensor,
    column: int,
    snap: _Nearest,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Quantise U and W of one complex column; note the values that were rounded.

    Args:
        pair: (2n, 2), columns j and m + j as corrected so far.
        corner: (2, 2), their block of the inverse's factor; its metric is that of the error that
            the columns to come cannot mend.
        column: j.
        snap: rounds.
        targets: (2, 2, m, n), gets U and W before rounding.

    Returns:
        (2n, 2), pair minus its rounded form.
    """
    n = len(pair) // 2
    (a11, a12), (a21, a22) = pair[:n].T, pair[n:].T
    u_re, u_im = (a11 + a22) / 2, (a21 - a12) / 2
    w_re, w_im = (a11 - a22) / 2, (a12 + a21) / 2
    targets[0, 0, column], targets[0, 1, column] = u_re, u_im
    q_re, q_im = snap(0, column, u_re, u_im)
    u_re, u_im = u_re - q_re, u_im - q_im
    # In (U, W) the real metric s is [[a, b], [conj b, a]], a = s11 + s22, b = s11 - s22 + 2i s12:
    # for an error e of U the best error of W is -e b / a.
    s = torch.linalg.inv(corner.T @ corner).tolist()
    total = s[0][0] + s[1][1]
    b_re, b_im = (s[0][0] - s[1][1]) / total, 2 * s[0][1] / total
    t_re = w_re + u_re * b_re - u_im * b_im
    t_im = w_im + u_re * b_im + u_im * b_re
    targets[1, 0, column], targets[1, 1, column] = t_re, t_im
    q_re, q_im = snap(1, column, t_re, t_im)
    w_re, w_im = w_re - q_re, w_im - q_im
    left = torch.cat([u_re + w_re, u_im + w_im])
    right = torch.cat([w_im - u_im, u_re - w_re])
    return torch.stack([left, right], dim=1)


class _Nearest:
    """Rounds complex columns to the nearest sums of the scales' stages."""

    def __init__(self, start: PhaseTensor, device: torch.device) -> None:
        book = codebook(start.stages)
        scales = start.scales.astype(np.float32)
        self._width = TILE if start.scale == "tile64" else start.m
        points = [book.points(scales[:, k])[:2] for k in range(2)]  # term, (re, im)
        # (term, re or im, column tile, rows, points): the largest of neighbours in memory is found
        # four times as fast as that of neighbouring rows.
        both = torch.from_numpy(np.array(points)).permute(0, 1, 4, 3, 2)
        if start.scale == "tile64":
            both = both.repeat_interleave(TILE, dim=-2)[..., : start.n, :]
        self._points = both.contiguous().to(device)
        self._half = self._points.square().sum(dim=1) / 2

    def __call__(
        self, term: int, column: int, re: torch.Tensor, im: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest (re, im), each (n,), of a column of term 0 (U) or 1 (W)."""
        tile = column // self._width
        point_re, point_im = self._points[term, :, tile]
        scores = re.abs()[:, None] * point_re
        scores.addcmul_(im.abs()[:, None], point_im)
        scores -= self._half[term, tile]
        best = scores.argmax(dim=1, keepdim=True)
        found = [p.expand(len(re), -1).gather(1, best)[:, 0] for p in (point_re, point_im)]
        return torch.copysign(found[0], re), torch.copysign(found[1], im)
