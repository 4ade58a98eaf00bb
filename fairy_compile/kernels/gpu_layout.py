"""The packed weight of every GPU kernel but CUDA's: words of 32 bits, units of 16 columns.

``codes`` uint32 (n, units * terms * T), units = ceil(m / 16). The bits of a complex row i of the
stacked parts, complex column c, term k and stage t are in word

    codes[i, (c // 16) * terms * T + k * T + 2 * (t // 2) + (c % 16) // per]     per = 32 // width
    at bit width * (c % per) + 2 * (t % 2)

where width is 4 for stages that have a partner (t ^ 1 < T), else 2. So the stages of a column come
in pairs of 4 adjacent bits, an index of 16 sums; a last stage of an odd T has two bits. One unit of
all terms and stages is contiguous: at T = 2 with two terms 128 bits. Columns from m on are code 0.

``scales`` float32 (row tiles, column tiles, terms * T, 2): the scales of the tensors' tiles, axis 3
being (re, im). Row tiles of the parts are stacked: part p's are n_p / rows, rounded up, with the
rows of `phase.tile_shape`.

Words are read whole, so that devices without 8-bit storage can use the layout too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fairy_compile.kernels.base import ArraySpec
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.phase import PhaseTensor, tile_shape

UNIT = 16
"""Complex columns of a unit."""


def units(spec: PhaseSpec) -> int:
    """Return the units of a row."""
    return -(-spec.m // UNIT)


def code_place(stage: int, stages: int, column: int) -> tuple[int, int]:
    """Return (word within the term's T words, bit) of a code; ``column`` is within the unit."""
    width = 4 if stage ^ 1 < stages else 2
    per = 32 // width
    return 2 * (stage // 2) + column // per, width * (column % per) + 2 * (stage % 2)


def row_tiles(spec: PhaseSpec) -> list[tuple[int, int]]:
    """Return (first row tile, rows of a tile) of each part."""
    tiles, first = [], 0
    for rows in spec.parts:
        tile = tile_shape(spec.scale, rows, spec.m)[0]
        tiles.append((first, tile))
        first += -(-rows // tile)
    return tiles


class WordsLayout:
    """See the module's text."""

    name = "words"

    def arrays(self, spec: PhaseSpec) -> dict[str, ArraySpec]:
        """See `Layout.arrays`."""
        planes = spec.stages * len(spec.terms)
        row_count = sum(-(-n // tile_shape(spec.scale, n, spec.m)[0]) for n in spec.parts)
        columns = tile_shape(spec.scale, spec.n, spec.m)[1]
        return {
            "codes": ArraySpec((spec.n, units(spec) * planes), "uint32"),
            "scales": ArraySpec((row_count, -(-spec.m // columns), planes, 2), "float32"),
        }

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """See `Layout.pack`."""
        words = np.zeros(self.arrays(spec)["codes"].shape, np.uint32)
        first = 0
        for part in parts:
            words[first : first + part.n] = self._pack_rows(part, units(spec))
            first += part.n
        scales = [
            part.scales.astype(np.float32)
            .transpose(3, 4, 1, 0, 2)
            .reshape(part.scales.shape[3], part.scales.shape[4], -1, 2)
            for part in parts
        ]
        return {"codes": words, "scales": np.ascontiguousarray(np.concatenate(scales))}

    @staticmethod
    def _pack_rows(part: PhaseTensor, unit_count: int) -> np.ndarray:
        stages, terms = part.codes.shape[:2]
        words = np.zeros((part.n, unit_count, terms, stages), np.uint32)
        for k in range(terms):
            for t in range(stages):
                codes = np.zeros((part.n, unit_count * UNIT), np.uint32)
                codes[:, : part.m] = _columns(part, t, k)
                columns = codes.reshape(part.n, unit_count, UNIT)
                for column in range(UNIT):
                    word, bit = code_place(t, stages, column)
                    words[:, :, k, word] |= columns[:, :, column] << np.uint32(bit)
        return words.reshape(part.n, -1)

    def unpack(self, arrays: Mapping[str, np.ndarray], spec: PhaseSpec) -> list[PhaseTensor]:
        """See `Layout.unpack`; exact."""
        terms, stages = len(spec.terms), spec.stages
        words = arrays["codes"].reshape(spec.n, units(spec), terms, stages)
        codes = np.empty((stages, terms, spec.n, units(spec), UNIT), np.uint8)
        for t in range(stages):
            for column in range(UNIT):
                word, bit = code_place(t, stages, column)
                bits = words[:, :, :, word] >> np.uint32(bit) & np.uint32(3)
                codes[t, :, :, :, column] = bits.transpose(2, 0, 1)
        codes = codes.reshape(stages, terms, spec.n, -1)[..., : spec.m]
        out, row = [], 0
        for n, (tile, rows) in zip(spec.parts, row_tiles(spec), strict=True):
            own = arrays["scales"][tile : tile + -(-n // rows)]
            scales = own.reshape(*own.shape[:2], terms, stages, 2).transpose(3, 2, 4, 0, 1)
            part = np.ascontiguousarray(codes[:, :, row : row + n])
            out.append(
                PhaseTensor.from_codes(part, np.ascontiguousarray(scales), spec.terms, spec.scale)
            )
            row += n
        return out


def _columns(part: PhaseTensor, stage: int, term: int) -> np.ndarray:
    """Return one plane's codes, uint8 (n, m); a whole layer's would take much memory."""
    quads = part.codes[stage, term]
    columns = np.stack([(quads >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return columns.reshape(part.n, -1)[:, : part.m]
