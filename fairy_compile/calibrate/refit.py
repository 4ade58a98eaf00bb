"""Scales of given codes by least squares under a Hessian, with conjugate gradients.

The squared output error is quadratic in the scales. Its gradient needs one product with the
Hessian and sums over the codes, so conjugate gradients fit the scales of every granularity without
forming normal equations. Rows that share no scale are independent problems; they are iterated side
by side, each with steps of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fairy_compile.phase import FAIRY2I_MIN_SCALE, PhaseTensor, tile_shape

_ITERATIONS = 12
# A pair of scales per stage and term is all a tensor granularity has to fit: this many complex
# rows determine it.
_SAMPLE_ROWS = 512


def refit_scales(a: torch.Tensor, hessian: torch.Tensor, tensor: PhaseTensor) -> PhaseTensor:
    """Return ``tensor`` with the scales that bring it nearest to ``a`` under ``hessian``.

    Where fitted scales would not be positive or not be better, the old ones stay.

    Args:
        a: float32 (2n, 2m), the exact weight.
        hessian: float32 (2m, 2m), positive definite.
        tensor: its phase form with terms ("U", "W").
    """
    step = -(-tensor.n // _SAMPLE_ROWS) if tensor.scale == "tensor" else 1
    rows = torch.arange(0, tensor.n, step, device=a.device)
    problem = ScaleMap(tensor, rows)
    want = a[torch.cat([rows, tensor.n + rows])]
    before = torch.from_numpy(tensor.scales.astype(np.float32)).to(a.device)
    scales = before.clone()

    def rate(scales: torch.Tensor) -> torch.Tensor:
        lost = want - problem.dense(scales)
        return problem.per_block_rows((lost @ hessian) * lost)

    diagonal = problem.squares(hessian.diagonal())
    weak = diagonal <= 1e-12 * diagonal.max()
    inverse = torch.where(weak, 0.0, 1.0 / diagonal.clamp(min=1e-30))
    residual = problem.adjoint((want - problem.dense(scales)) @ hessian)
    step_to = inverse * residual
    size = problem.per_block(residual * step_to)
    for _ in range(_ITERATIONS):
        bent = problem.adjoint(problem.dense(step_to) @ hessian)
        curve = problem.per_block(step_to * bent)
        pace = torch.where(curve > 0, size / curve.clamp(min=1e-30), 0.0)
        scales += pace * step_to
        residual -= pace * bent
        fresh = inverse * residual
        new_size = problem.per_block(residual * fresh)
        step_to = fresh + torch.where(size > 0, new_size / size.clamp(min=1e-30), 0.0) * step_to
        size = new_size
    scales = scales.clamp(min=FAIRY2I_MIN_SCALE)
    better = rate(scales) < rate(before)
    scales = torch.where(better[:, None], scales, before)
    return dataclasses.replace(tensor, scales=scales.cpu().numpy())


class ScaleMap:
    """The linear map from scales to the real matrix, its adjoint, and sums over blocks.

    Scales have the shape (T, terms, 2, n_tiles, m_tiles). A block is a row of tiles: no scale of it
    touches another block.

    Args:
        tensor: gives the codes.
        rows: (r,) complex rows to look at; all of them unless the granularity is tensor.
    """

    def __init__(self, tensor: PhaseTensor, rows: torch.Tensor) -> None:
        codes = torch.from_numpy(tensor.unpack()).to(rows.device)[:, :, rows]
        sign = 1 - (codes & 2).to(torch.int8)
        # (T, terms, 2, r, m): the factor of s_re and of s_im
        self._signs = torch.stack([sign * (codes & 1 == axis) for axis in (0, 1)], dim=2)
        self._tile = tile_shape(tensor.scale, len(rows), tensor.m)
        self._shape = tensor.scales.shape
        self._m = tensor.m

    def _spread(self, scales: torch.Tensor) -> torch.Tensor:
        rows = self._signs.shape[3]
        if self._shape[3] > 1:
            scales = scales.repeat_interleave(self._tile[0], dim=3)[:, :, :, :rows]
        if self._shape[4] > 1:
            scales = scales.repeat_interleave(self._tile[1], dim=4)[..., : self._m]
        return scales

    def dense(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the real matrix (2r, 2m) of the codes with ``scales``."""
        (u_re, u_im), (w_re, w_im) = (self._spread(scales) * self._signs).sum(dim=0)
        top = torch.cat([u_re + w_re, w_im - u_im], dim=1)
        return torch.cat([top, torch.cat([u_im + w_im, u_re - w_re], dim=1)])

    def _pool(self, values: torch.Tensor) -> torch.Tensor:
        """Sum (..., r, m) over tiles."""
        for axis, size in ((-2, self._tile[0]), (-1, self._tile[1])):
            parts = values.split(size, dim=axis)
            if len(parts) == values.shape[axis]:
                continue  # tiles of one row
            values = torch.cat([p.sum(dim=axis, keepdim=True) for p in parts], dim=axis)
        return values

    def adjoint(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the inner product of ``matrix`` (2r, 2m) with each scale's pattern."""
        r, m = len(matrix) // 2, self._m
        a11, a12, a21, a22 = matrix[:r, :m], matrix[:r, m:], matrix[r:, :m], matrix[r:, m:]
        u, w = torch.stack([a11 + a22, a21 - a12]), torch.stack([a11 - a22, a12 + a21])
        return self._pool(torch.stack([u, w]) * self._signs)

    def squares(self, diagonal: torch.Tensor) -> torch.Tensor:
        """Return each pattern's squared size under a diagonal (2m,) of the Hessian."""
        weights = diagonal[: self._m] + diagonal[self._m :]
        return self._pool(self._signs.square() * weights)

    def per_block(self, scales: torch.Tensor) -> torch.Tensor:
        """Sum what belongs to a block: (n_tiles, 1)."""
        return scales.sum(dim=(0, 1, 2, 4))[:, None]

    def per_block_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Sum (2r, 2m) over blocks: (n_tiles,)."""
        r = len(matrix) // 2
        rows = matrix.sum(dim=1)
        rows = rows[:r] + rows[r:]
        return torch.stack([part.sum() for part in rows.split(self._tile[0])])
