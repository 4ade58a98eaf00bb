"""Packed weights of the ARM kernels: one layout, R8C8, for every instruction set.

A row tile is 8 complex rows and a column block 8 complex columns, so the 64 bytes of a plane are
four NEON registers of two rows each:

    codes[row tile][step][plane][8 * row + column]  =  c0 | c1 << 2 | c2 << 4 | c3 << 6

    register v  =  [ row 2v, columns 0..7 | row 2v + 1, columns 0..7 ]

which is the 2 x 8 operand of smmla; sdot leaves two sums a row, which one addp adds. Nibbles,
steps, planes, and the other arrays are those of `x86_layout`, with signed tables.

Where `arm_tables.has_signs`, i.e. U and W of two stages with tensor scales, a byte has the same
four codes as signs, ``sign_bytes()[byte]``, and the tables of a nibble of codes are indexed by
signs, ``table[sign_nibble()]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fairy_compile.kernels.arm_tables import (
    combined_arrays,
    has_combined,
    has_signs,
    sign_bytes,
    sign_nibble,
)
from fairy_compile.kernels.base import ArraySpec
from fairy_compile.kernels.x86_layout import X86Layout
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor

ROWS = 8
BLOCK = 8
# Joint entries are at most p + q in size, and tables are int8.
JOINT_LIMIT = 127


class ArmLayout(X86Layout):
    """`X86Layout` with bytes of signs for two stages and, where `has_combined`, two more arrays:

    - ``combined_tables`` int8 (tiles, 2, 4, 16) and ``combined_scales`` float32 (tiles, 2, 2):
      `combined_arrays` of the tile's part.
    """

    def __init__(self) -> None:
        super().__init__(ROWS, JOINT_LIMIT, block=BLOCK, signed=True)
        self.name += "C"

    def arrays(self, spec: PhaseSpec) -> dict[str, ArraySpec]:
        """See `Layout.arrays`."""
        arrays = super().arrays(spec)
        if has_combined(spec):
            tiles = self.tiles(spec)
            arrays["combined_tables"] = ArraySpec((tiles, 2, 4, 16), "int8")
            arrays["combined_scales"] = ArraySpec((tiles, 2, 2), "float32")
        return arrays

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """See `Layout.pack`."""
        packed = super().pack(parts, spec)
        if has_combined(spec):
            for part, tiles in zip(parts, self._tile_ranges(spec), strict=True):
                tables, scales = combined_arrays(part)
                packed["combined_tables"][tiles] = tables
                packed["combined_scales"][tiles] = scales
        if has_signs(spec):
            _translate(packed["codes"], sign_bytes())
            for name in ("tables", "joint_tables"):
                packed[name] = np.ascontiguousarray(packed[name][..., sign_nibble()])
        return packed

    def unpack(self, arrays: Mapping[str, np.ndarray], spec: PhaseSpec) -> list[PhaseTensor]:
        """See `Layout.unpack`."""
        if has_signs(spec):
            codes = np.array(arrays["codes"])
            _translate(codes, np.argsort(sign_bytes()).astype(np.uint8))
            arrays = {**arrays, "codes": codes}
        return super().unpack(arrays, spec)


def _translate(codes: np.ndarray, table: np.ndarray) -> None:
    """Replace every byte in place, a row tile at a time to bound memory."""
    for tile in codes:
        tile[:] = table[tile]


ARM_LAYOUT = ArmLayout()
