"""The blocks that decode on CUDA: row tiles, warps, and groups of codes on their way.

A warp multiplies a row tile by some of its groups of 128 columns. What it has asked memory for
waits in registers, of which a multiprocessor has 65536: a warp with many planes takes more of them
for sums, and has more bytes on their way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairy_compile.kernels.cuda_layout import CudaLayout, planes
from fairy_compile.op import PhaseSpec

MULTIPROCESSORS = 132  # of an H200

_MOST_TILES = 14  # of a block for one row or two
_WARPS, _FEW_WARPS = 16, 12
_ASKED_PLANES = 8  # of weights of which a warp asks for two groups: more take too many registers


@dataclass(frozen=True)
class DecodeBlock:
    """What a block that decodes consists of.

    Attributes:
        tiles: row tiles.
        slices: warps that share the columns of a tile.
        asked: groups of columns that a warp has asked for at a time.
    """

    tiles: int
    slices: int
    asked: int

    @property
    def warps(self) -> int:
        """Warps of the block."""
        return self.tiles * self.slices


def decode_block(
    layout: CudaLayout, spec: PhaseSpec, chosen: Mapping[str, Any], operands: int
) -> DecodeBlock:
    """Return the block for a number of operands B, i.e. of rows of x.

    Where knobs say nothing else, a multiprocessor has one block and all have the same number of row
    tiles, or twice, ... as many. For one operand it has 16 warps that ask for two groups, where
    that leaves enough of them, or up to 28 warps with few planes: of what was tried on an H200 the
    fastest by the mean over layers of 7B, 13B and 70B models. For 8 planes it is at most 9 % behind
    the best for any of these.
    """
    groups, tiles = layout.groups(spec), chosen["row_tiles"]
    warps, asked = chosen["warps"], chosen["asked"]
    if tiles == "auto":
        share = math.ceil(layout.tiles(spec) / MULTIPROCESSORS)
        tiles = math.ceil(share / math.ceil(share / (_MOST_TILES if operands == 1 else 7)))
    two = operands == 1 and planes(spec) == _ASKED_PLANES and asked != 1
    if two and warps == "auto" and _WARPS // tiles == 1 and tiles < _FEW_WARPS:
        warps = 2 * tiles
    if warps == "auto":
        warps = 28 if operands == 1 and planes(spec) < _ASKED_PLANES else _WARPS
    two = two and (asked == 2 or warps <= _WARPS)  # of two, more would not fit registers
    if asked == "auto":
        asked = 2 if two else 1
    tiles = min(tiles, warps)
    turns = math.ceil(groups / (warps // tiles))
    slices = math.ceil(groups / turns)  # fewer warps that take as many turns
    return DecodeBlock(tiles, slices, asked if operands == 1 else 1)
