"""Packed weights for CUDA: Gray-coded bits in the order in which tensor cores take bytes.

A weight serves decode, whose operand A of ``mma.m16n8k32`` (u8 or s8 x s8) is a 128-bit load of
codes, a shift and a mask, and prefill, which looks bits of the same load up to float16 operands of
``mma.m16n8k16``.

**Bits.** A 2-bit code w is stored as g = w ^ (w >> 1). Write the code's phase as re + i im; then
the bits of g are the signs of two sums:

    code  phase   g    bit 0: sign of q = re - im    bit 1: sign of p = re + im
    0      1      00   q =  1                        p =  1
    1      i      01   q = -1                        p =  1
    2     -1      11   q = -1                        p = -1
    3     -i      10   q =  1                        p = -1

A weight (complex row, complex column) has P = 2 T terms bits, its *planes*: bit b of plane number
2 (stage * terms + term) + b.

**Bytes.** A row tile is 16 complex rows, a column group 128 complex columns (the group of quantised
activations), made of four blocks of 32. A lane of a warp holds 4 P bits of each of 16 positions
(row, column in a block), in P / 2 *fragments* of 16 bytes:

    codes[tile][group][fragment][lane][4 r + e]

    row in the tile      lane // 4 + 8 (r % 2)
    column in a block    8 (lane % 4) + 4 (r // 2) + e
    bit s                bit b = 8 fragment + s of the position: plane b % P of block b // P

so that T stages cost T bits per real weight, and a fragment of one stage or two (P = 4, 8) holds
whole blocks. Register r of a lane's 128-bit load is register r of operand A, but for the order of
columns: both operands may order the reduction as they like, and this order gives a lane eight
neighbouring columns of x.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from fairy_compile.kernels.base import ArraySpec
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase import PhaseTensor, unpack_codes
from fairy_compile.phase.tensor import TILE

TILE_ROWS = 16
BLOCK = 32
BLOCKS = ACT_GROUP // BLOCK
_TILES_AT_ONCE = 64  # packing unpacks codes to bytes: bounds its memory

# Axes of a row tile and a group as `_positions` splits them.
_ROW_HIGH, _ROW_LOW, _COLUMN_LANE, _COLUMN_HIGH, _COLUMN_LOW = 2, 8, 4, 2, 4


def gray(codes: np.ndarray) -> np.ndarray:
    """Return codes as stored: bit 0 is the sign of re - im, bit 1 that of re + im."""
    return codes ^ (codes >> 1)


def planes(spec: PhaseSpec) -> int:
    """Return P, the bits of one complex weight."""
    return 2 * spec.stages * len(spec.terms)


class CudaLayout:
    """Row tiles of bit planes, as the module describes.

    Arrays, with tiles = sum over parts of ceil(rows of the part / 16), groups = ceil(m / 128) and
    pairs = T terms in the order (stage, term):

    - ``codes`` uint8 (tiles, groups, P / 2, 32, 16). Padding rows and columns are code 0; they meet
      zero activations or rows that are not stored.
    - ``scales`` float32 (tiles, column tiles, pairs, 2, rows): column tiles is 2 groups for scale
      ``tile64``, else 1; rows is 16 for scale ``row``, else 1; axis 3 is (re, im). Padding is 1,
      since a scale that is not positive is taken for damage.
    """

    name = "cuda.planes"

    def tiles(self, spec: PhaseSpec) -> int:
        """Row tiles of all parts; each part starts a tile of its own."""
        return sum(-(-rows // TILE_ROWS) for rows in spec.parts)

    def groups(self, spec: PhaseSpec) -> int:
        """Column groups of a row."""
        return -(-spec.m // ACT_GROUP)

    def arrays(self, spec: PhaseSpec) -> dict[str, ArraySpec]:
        """See `Layout.arrays`."""
        tiles, groups = self.tiles(spec), self.groups(spec)
        pairs = spec.stages * len(spec.terms)
        column_tiles = ACT_GROUP // TILE * groups if spec.scale == "tile64" else 1
        rows = TILE_ROWS if spec.scale == "row" else 1
        return {
            "codes": ArraySpec((tiles, groups, planes(spec) // 2, 32, 16), "uint8"),
            "scales": ArraySpec((tiles, column_tiles, pairs, 2, rows), "float32"),
        }

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """See `Layout.pack`."""
        packed = {n: np.zeros(a.shape, a.dtype) for n, a in self.arrays(spec).items()}
        for part, tiles in zip(parts, self._tile_ranges(spec), strict=True):
            codes = packed["codes"][tiles]
            for first in range(0, len(codes), _TILES_AT_ONCE):
                some = slice(first * TILE_ROWS, (first + _TILES_AT_ONCE) * TILE_ROWS)
                rows = unpack_codes(part.codes[:, :, some], part.m)
                _pack_rows(rows, codes[first : first + _TILES_AT_ONCE])
            packed["scales"][tiles] = _spread_scales(part, len(codes), self.groups(spec))
        return packed

    def unpack(self, arrays: Mapping[str, np.ndarray], spec: PhaseSpec) -> list[PhaseTensor]:
        """See `Layout.unpack`; exact for codes and float32 scales."""
        parts = []
        for rows, tiles in zip(spec.parts, self._tile_ranges(spec), strict=True):
            codes = _unpack_rows(arrays["codes"][tiles], spec)[:, :, :rows, : spec.m]
            scales = _gather_scales(arrays["scales"][tiles], rows, spec)
            parts.append(PhaseTensor.from_codes(codes, scales, spec.terms, spec.scale))
        return parts

    def tile_starts(self, spec: PhaseSpec) -> list[int]:
        """Return the first row tile of each part."""
        return [tiles.start for tiles in self._tile_ranges(spec)]

    def _tile_ranges(self, spec: PhaseSpec) -> list[slice]:
        ends = itertools.accumulate([-(-rows // TILE_ROWS) for rows in spec.parts], initial=0)
        return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _positions(values: np.ndarray, tiles: int, groups: int) -> np.ndarray:
    """Split (planes, rows, columns) to (planes, tile, r % 2, lane // 4, group, block, lane % 4,
    r // 2, e)."""
    return values.reshape(
        -1,
        tiles,
        _ROW_HIGH,
        _ROW_LOW,
        groups,
        BLOCKS,
        _COLUMN_LANE,
        _COLUMN_HIGH,
        _COLUMN_LOW,
    )


def _pack_rows(codes: np.ndarray, out: np.ndarray) -> None:
    """Pack codes (T, terms, rows, m) into ``out`` (tiles, groups, P / 2, 32, 16)."""
    tiles, groups, fragments = out.shape[:3]
    stages, terms, rows, m = codes.shape
    padded = np.zeros((stages * terms, tiles * TILE_ROWS, groups * ACT_GROUP), np.uint8)
    padded[:, :rows, :m] = gray(codes.reshape(-1, rows, m))
    bits = np.stack([padded & 1, padded >> 1], axis=1)
    split = _positions(bits, tiles, groups)
    # To (tile, group, lane // 4, lane % 4, r // 2, r % 2, e, block, plane).
    ordered = split.transpose(1, 4, 3, 6, 7, 2, 8, 5, 0)
    packed = np.packbits(ordered.reshape(tiles, groups, 32, 16, fragments, 8), -1, "little")
    out[:] = packed[..., 0].transpose(0, 1, 4, 2, 3)


def _unpack_rows(packed: np.ndarray, spec: PhaseSpec) -> np.ndarray:
    """Undo `_pack_rows`: -> (T, terms, rows, columns), padding included."""
    tiles, groups = packed.shape[:2]
    bits = np.unpackbits(packed.transpose(0, 1, 3, 4, 2), axis=-1, bitorder="little")
    ordered = bits.reshape(
        tiles,
        groups,
        _ROW_LOW,
        _COLUMN_LANE,
        _COLUMN_HIGH,
        _ROW_HIGH,
        _COLUMN_LOW,
        BLOCKS,
        planes(spec),
    )
    split = ordered.transpose(8, 0, 5, 2, 1, 7, 3, 4, 6)
    low, high = split[::2], split[1::2]
    codes = (low ^ high) | high << 1
    return codes.reshape(spec.stages, len(spec.terms), tiles * TILE_ROWS, groups * ACT_GROUP)


def _spread_scales(part: PhaseTensor, tiles: int, groups: int) -> np.ndarray:
    """Return a part's scales as (tiles or 1, column tiles, pairs, 2, rows)."""
    # (row tiles, column tiles, pairs, 2)
    by_pair = part.scales.astype(np.float32).reshape(-1, 2, *part.scales.shape[3:])
    by_tile = by_pair.transpose(2, 3, 0, 1)
    if part.scale == "tensor":
        return by_tile[..., None]
    if part.scale == "row":
        padded = np.ones((tiles * TILE_ROWS, *by_tile.shape[2:]), np.float32)
        padded[: part.n] = by_tile[:, 0]
        return padded.reshape(tiles, 1, TILE_ROWS, *by_tile.shape[2:]).transpose(0, 1, 3, 4, 2)
    spread = np.ones((tiles, ACT_GROUP // TILE * groups, *by_tile.shape[2:], 1), np.float32)
    own = by_tile[np.arange(tiles) * TILE_ROWS // TILE]
    spread[:, : own.shape[1], ..., 0] = own
    return spread


def _gather_scales(packed: np.ndarray, rows: int, spec: PhaseSpec) -> np.ndarray:
    """Undo `_spread_scales`: -> (T, terms, 2, row tiles, column tiles)."""
    if spec.scale == "tensor":
        by_tile = packed[:1, ..., 0]
    elif spec.scale == "row":
        by_tile = packed[:, 0].transpose(0, 3, 1, 2).reshape(-1, 1, *packed.shape[2:4])[:rows]
    else:
        by_tile = packed[:: TILE // TILE_ROWS, : -(-spec.m // TILE), ..., 0]
    by_pair = by_tile.transpose(2, 3, 0, 1)
    lead = (spec.stages, len(spec.terms))
    return np.ascontiguousarray(by_pair.reshape(*lead, *by_pair.shape[1:]))
