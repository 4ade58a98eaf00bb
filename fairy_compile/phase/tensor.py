"""`PhaseTensor`: a linear layer as packed phase codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fairy_compile.config import GRANULARITIES, MAX_STAGES, Granularity, Term, check_choice
from fairy_compile.errors import ModelFileError
from fairy_compile.phase.widely_linear import from_widely_linear

TILE = 64


def tile_shape(scale: Granularity, n: int, m: int) -> tuple[int, int]:
    """Return (rows, columns) of the complex tile that shares one pair of scales."""
    check_choice("scale granularity", scale, GRANULARITIES)
    return {"tensor": (n, m), "row": (1, m), "tile64": (TILE, TILE)}[scale]


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Pack phase codes four to a byte, lowest bits first.

    Args:
        codes: uint8 (..., m) with values 0..3.

    Returns:
        uint8 (..., ceil(m / 4)); byte j holds columns 4j .. 4j+3 in bits 0-1, 2-3, 4-5, 6-7.
        Padding columns are code 0.
    """
    m = codes.shape[-1]
    padded = np.zeros((*codes.shape[:-1], -(-m // 4) * 4), np.uint8)
    padded[..., :m] = codes
    quads = padded.reshape(*codes.shape[:-1], -1, 4)
    packed = quads[..., 0] | (quads[..., 1] << 2)
    packed |= quads[..., 2] << 4
    packed |= quads[..., 3] << 6
    return packed


def unpack_codes(packed: np.ndarray, m: int) -> np.ndarray:
    """Undo `pack_codes`: uint8 (..., ceil(m / 4)) -> uint8 (..., m) of values 0..3."""
    quads = np.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return quads.reshape(*packed.shape[:-1], -1)[..., :m]


@dataclass(frozen=True, eq=False)  # the comparison of dataclasses fails on arrays
class PhaseTensor:
    """A real linear map (2n, 2m) as residual phase stages of U and W.

    With phase values 1, i, -1, -i for codes 0..3, a stage's matrix has the entry
    ``±s_re`` (codes 0, 2) or ``±i s_im`` (codes 1, 3); a term is the sum of its T stages; the
    layer is y = U x + W conj(x), or y = W conj(x) where ``terms`` is ``("W",)`` (iFairy).

    Attributes:
        codes: uint8 (T, terms, n, ceil(m/4)), see `pack_codes`.
        scales: float32 or float16 (T, terms, 2, n_tiles, m_tiles), axis 2 being (re, im).
        n: complex rows; the real output has 2n features.
        m: complex columns; the real input has 2m features.
        terms: ("U", "W") or ("W",), naming axis 1.
        scale: granularity of the scales; the tile is `tile_shape(scale, n, m)`.
    """

    codes: np.ndarray
    scales: np.ndarray
    n: int
    m: int
    terms: tuple[Term, ...]
    scale: Granularity

    def __post_init__(self) -> None:
        stages = self.codes.shape[0] if self.codes.ndim else 0
        tile = tile_shape(self.scale, self.n, self.m)
        tiles = (-(-self.n // tile[0]), -(-self.m // tile[1]))
        want_codes = (stages, len(self.terms), self.n, -(-self.m // 4))
        want_scales = (stages, len(self.terms), 2, *tiles)
        if not 1 <= stages <= MAX_STAGES:
            raise ModelFileError(f"phase codes have {stages} stages; allowed: 1 to {MAX_STAGES}")
        if tuple(self.terms) not in (("U", "W"), ("W",)):
            raise ModelFileError(f"terms are {self.terms!r}; allowed: ('U', 'W') or ('W',)")
        if self.codes.dtype != np.uint8 or self.codes.shape != want_codes:
            raise ModelFileError(
                f"phase codes are {self.codes.dtype} {self.codes.shape}; expected uint8 "
                f"{want_codes}"
            )
        if self.scales.dtype not in (np.float32, np.float16) or self.scales.shape != want_scales:
            raise ModelFileError(
                f"phase scales are {self.scales.dtype} {self.scales.shape}; expected float32 or "
                f"float16 {want_scales}"
            )
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            raise ModelFileError("phase scales must be finite and positive; found one that is not")

    def __eq__(self, other: object) -> bool:
        """Tell whether codes, scales and their dtype, terms and granularity are the same."""
        if not isinstance(other, PhaseTensor):
            return NotImplemented
        return (
            (self.shape, tuple(self.terms), self.scale)
            == (other.shape, tuple(other.terms), other.scale)
            and self.scales.dtype == other.scales.dtype
            and np.array_equal(self.codes, other.codes)
            and np.array_equal(self.scales, other.scales)
        )

    __hash__ = None  # as of arrays

    @classmethod
    def from_codes(
        cls, codes: np.ndarray, scales: np.ndarray, terms: tuple[Term, ...], scale: Granularity
    ) -> PhaseTensor:
        """Pack unpacked codes, uint8 (T, terms, n, m) of values 0..3."""
        if codes.size and codes.max() > 3:
            raise ModelFileError(f"phase codes go up to {codes.max()}; allowed: 0 to 3")
        if codes.size and codes.min() < 0:
            raise ModelFileError(f"phase codes go down to {codes.min()}; allowed: 0 to 3")
        n, m = codes.shape[-2:]
        return cls(pack_codes(codes), np.ascontiguousarray(scales), n, m, terms, scale)

    @property
    def stages(self) -> int:
        """T, the number of residual stages."""
        return self.codes.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (2n, 2m) of the real map."""
        return 2 * self.n, 2 * self.m

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales included and padding not, per real weight of the layer.

        A widely-linear layer has 4nm real weights, a complex one (terms ("W",)) 2nm.
        """
        code_bits = 2 * self.stages * len(self.terms) * self.n * self.m
        scale_bits = self.scales.size * self.scales.dtype.itemsize * 8
        return (code_bits + scale_bits) / (2 * len(self.terms) * self.n * self.m)

    def unpack(self) -> np.ndarray:
        """Return the codes one to a byte: uint8 (T, terms, n, m), values 0..3."""
        return unpack_codes(self.codes, self.m)

    def dequantize_terms(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return each term's (re, im) sum over stages, float32 (n, m).

        Stages are added in order in float32, which is what the published rule does.
        """
        out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        codes, scales = self.unpack(), self.scales.astype(np.float32)
        tile = tile_shape(self.scale, self.n, self.m)
        for k, term in enumerate(self.terms):
            re = np.zeros((self.n, self.m), np.float32)
            im = np.zeros_like(re)
            for t in range(self.stages):
                code = codes[t, k]
                sign = np.float32(1) - (code & 2).astype(np.float32)
                on_imag = (code & 1).astype(np.float32)
                s_re, s_im = (spread_scales(s, tile, self.n, self.m) for s in scales[t, k])
                re += sign * (np.float32(1) - on_imag) * s_re
                im += sign * on_imag * s_im
            out[term] = (re, im)
        return out

    def dequantize(self) -> np.ndarray:
        """Return the real float32 matrix (2n, 2m) this layer multiplies with."""
        terms = self.dequantize_terms()
        zero = np.zeros((self.n, self.m), np.float32)
        return from_widely_linear(terms.get("U", (zero, zero)), terms["W"])

    def with_scale_dtype(self, dtype: Any) -> PhaseTensor:
        """Return the same layer with its scales rounded to ``dtype`` (float32 or float16)."""
        scales = self.scales.astype(dtype)
        return PhaseTensor(self.codes, scales, self.n, self.m, self.terms, self.scale)


def spread_scales(scales: np.ndarray, tile: tuple[int, int], n: int, m: int) -> np.ndarray:
    """Repeat per-tile scales so that they broadcast over (n, m)."""
    rows = scales if scales.shape[0] == 1 else np.repeat(scales, tile[0], axis=0)[:n]
    return rows if rows.shape[1] == 1 else np.repeat(rows, tile[1], axis=1)[:, :m]
