"""Packed weights of the codebook kernels: two-bit codes in nibbles that index a byte shuffle.

A *row tile* is R complex rows. A *column block* is C complex columns: four on x86, what one byte
dot product (vpdpbusd, pmaddubsw) consumes per row; eight on ARM, what smmla does. A *step* is the
least number of column blocks whose codes fill whole bytes, i.e. blocks * terms * stages is a
multiple of 4. A step is stored as R C bytes (a *plane*) for every four codes per position:

    codes[row tile][step][plane][C * row + column]  =  c0 | c1 << 2 | c2 << 4 | c3 << 6

Which code (term, stage, column block of the step) each c is, `x86_tables.nibbles` says:

    terms  T   bytes of a step, one (nibble, nibble) each; bK is column block K of the step
    U, W   1   (u1 w1)b0 (u1 w1)b1
    U, W   2   (u1 u2) (w1 w2)
    U, W   3   (u1 u2)b0 (u1 u2)b1, (w1 w2)b0 (w1 w2)b1, (u3 w3)b0 (u3 w3)b1
    U, W   4   (u1 u2) (u3 u4), (w1 w2) (w3 w4)
    W      1   (w1b0 w1b1) (w1b2 w1b3)
    W      2   (w1 w2)b0 (w1 w2)b1

so that T stages cost exactly T bits per real weight. Two codes of a nibble are two stages of one
weight wherever there are two, which is what lets one table look up their weighted sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from fairy_compile.kernels.base import ArraySpec
from fairy_compile.kernels.x86_tables import (
    SPLIT_OFFSET,
    Code,
    Codebook,
    blocks_per_step,
    joint_arrays,
    joint_codebook,
    joint_offset,
    nibbles,
    pair_arrays,
    pair_codebook,
    split_codebook,
    split_tables,
)
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase import PhaseTensor, unpack_codes
from fairy_compile.phase.tensor import TILE

BLOCK = 4
_ROWS_AT_ONCE = 1024  # packing unpacks codes to bytes: bounds its memory


def has_joint(spec: PhaseSpec) -> bool:
    """Tell whether there are joint tables of stages: tensor scales and two stages or more."""
    return spec.scale == "tensor" and spec.stages >= 2


class X86Layout:
    """Row tiles of R = ``rows`` rows by column blocks of C = ``block``, as the module describes.

    Arrays, with tiles = sum over parts of ceil(rows of the part / R), columns padded to groups of
    128, units in the order (term, stage, axis):

    - ``codes`` uint8 (tiles, steps, planes, C R). Padding rows and columns are code 0; they meet
      zero activations or rows that are not stored.
    - ``tables`` uint8 (4, 16): `split_tables`.
    - ``scales`` float32 (tiles, 1, units) for scale ``tensor``, (tiles, 1, units, R) for ``row``,
      (tiles, columns / 64, units) for ``tile64``. Padding is 1, since a scale that is not positive
      is taken for damage.
    - ``joint_tables`` uint8 (tiles, joint units, 16) and ``joint_scales`` float32
      (tiles, 1, joint units), where `has_joint`: entries and scales of `joint_codebook`. They hold
      pairs of stages or, with ``pair_terms`` and one stage, U and W.

    ``joint_limit`` is the largest p + q of joint tables; the instruction set sets it. Where the
    instruction set multiplies signed bytes, the layout is ``signed``: tables are int8 and hold
    entries without the offset that makes them unsigned.

    Scales are kept per row tile so that the kernel need not know which part a tile belongs to.
    """

    def __init__(
        self,
        rows: int,
        joint_limit: int,
        block: int = BLOCK,
        signed: bool = False,
        pair_terms: bool = False,
    ) -> None:
        self.rows = rows
        self.joint_limit = joint_limit
        self.block = block
        self.signed = signed
        self.pair_terms = pair_terms
        self.name = f"R{rows}C{block}L{joint_limit}{'S' if signed else ''}"

    def has_pairs(self, spec: PhaseSpec) -> bool:
        """Tell whether the packed arrays hold joint tables of U and W."""
        one_stage = spec.stages == 1 and len(spec.terms) == 2
        return self.pair_terms and one_stage and spec.scale == "tensor"

    def has_joint(self, spec: PhaseSpec) -> bool:
        """Tell whether the packed arrays hold joint tables."""
        return has_joint(spec) or self.has_pairs(spec)

    def joint_codebook(self, spec: PhaseSpec) -> Codebook:
        """Return the codebook of the packed joint tables."""
        return pair_codebook() if self.has_pairs(spec) else joint_codebook(spec.terms, spec.stages)

    def tiles(self, spec: PhaseSpec) -> int:
        """Row tiles of all parts; each part starts a tile of its own."""
        return sum(-(-rows // self.rows) for rows in spec.parts)

    def steps(self, spec: PhaseSpec) -> int:
        """Steps of a row tile, columns padded to whole activation groups."""
        blocks = _padded_columns(spec) // self.block
        return blocks // blocks_per_step(len(spec.terms), spec.stages)

    def arrays(self, spec: PhaseSpec) -> dict[str, ArraySpec]:
        """Return name -> shape and dtype of the packed arrays, in kernel argument order."""
        tiles = self.tiles(spec)
        planes = len(nibbles(len(spec.terms), spec.stages)) // 2
        units = len(split_codebook(spec.terms, spec.stages).units)
        column_tiles = _padded_columns(spec) // TILE if spec.scale == "tile64" else 1
        per_row = (self.rows,) if spec.scale == "row" else ()
        entry = "int8" if self.signed else "uint8"
        arrays = {
            "codes": ArraySpec((tiles, self.steps(spec), planes, self.block * self.rows), "uint8"),
            "tables": ArraySpec((4, 16), entry),
            "scales": ArraySpec((tiles, column_tiles, units, *per_row), "float32"),
        }
        if self.has_joint(spec):
            joint = self.joint_codebook(spec).units
            tables = sum(unit.joint for unit in joint)
            arrays["joint_tables"] = ArraySpec((tiles, tables, 16), entry)
            arrays["joint_scales"] = ArraySpec((tiles, 1, len(joint)), "float32")
        return arrays

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """Pack the parts of one call; the arrays match `arrays(spec)`."""
        packed = {n: np.zeros(a.shape, a.dtype) for n, a in self.arrays(spec).items()}
        packed["tables"][:] = self._entries(split_tables(), SPLIT_OFFSET)
        for part, tiles in zip(parts, self._tile_ranges(spec), strict=True):
            self._pack_codes(part, packed["codes"][tiles], spec)
            packed["scales"][tiles] = self._spread_scales(part, spec)
            if self.has_joint(spec):
                fill = pair_arrays if self.has_pairs(spec) else joint_arrays
                tables, scales = fill(part, self.joint_limit)
                offset = joint_offset(self.joint_limit)
                packed["joint_tables"][tiles] = self._entries(tables, offset)
                packed["joint_scales"][tiles] = scales
        return packed

    def unpack(self, arrays: Mapping[str, np.ndarray], spec: PhaseSpec) -> list[PhaseTensor]:
        """Undo `pack`: codes exactly, scales as float32."""
        return [
            PhaseTensor.from_codes(
                self._unpack_codes(arrays["codes"][tiles], rows, spec),
                self._gather_scales(arrays["scales"][tiles], rows, spec),
                spec.terms,
                spec.scale,
            )
            for rows, tiles in zip(spec.parts, self._tile_ranges(spec), strict=True)
        ]

    def _entries(self, table: np.ndarray, offset: int) -> np.ndarray:
        """Take the offset off unsigned table entries where tables are signed."""
        return (table.astype(np.int16) - offset).astype(np.int8) if self.signed else table

    def _tile_ranges(self, spec: PhaseSpec) -> list[slice]:
        ends = np.cumsum([-(-rows // self.rows) for rows in spec.parts]).tolist()
        return [slice(a, b) for a, b in itertools.pairwise([0, *ends])]

    def _pack_codes(self, part: PhaseTensor, out: np.ndarray, spec: PhaseSpec) -> None:
        """Fill ``out`` (tiles, steps, planes, C R), some rows at a time."""
        terms, stages = len(spec.terms), spec.stages
        steps, blocks = out.shape[1], blocks_per_step(terms, stages)
        for first in range(0, part.n, _ROWS_AT_ONCE):
            some = unpack_codes(part.codes[:, :, first : first + _ROWS_AT_ONCE], part.m)
            tiles = -(-some.shape[2] // self.rows)
            padded = np.zeros((stages, terms, tiles * self.rows, _padded_columns(spec)), np.uint8)
            padded[:, :, : some.shape[2], : part.m] = some
            split = padded.reshape(stages, terms, tiles, self.rows, steps, blocks, self.block)
            target = out[first // self.rows : first // self.rows + tiles]
            target = target.reshape(tiles, steps, -1, self.rows, self.block)
            for shift, plane, code in _code_places(terms, stages):
                values = split[code.stage, code.term, :, :, :, code.block]
                target[:, :, plane] |= values.transpose(0, 2, 1, 3) << shift

    def _unpack_codes(self, packed: np.ndarray, rows: int, spec: PhaseSpec) -> np.ndarray:
        terms, stages = len(spec.terms), spec.stages
        tiles, steps = packed.shape[:2]
        blocks = blocks_per_step(terms, stages)
        out = np.empty((stages, terms, tiles, self.rows, steps, blocks, self.block), np.uint8)
        source = packed.reshape(tiles, steps, -1, self.rows, self.block)
        for shift, plane, code in _code_places(terms, stages):
            values = (source[:, :, plane] >> shift) & 3
            out[code.stage, code.term, :, :, :, code.block] = values.transpose(0, 2, 1, 3)
        return out.reshape(stages, terms, tiles * self.rows, -1)[:, :, :rows, : spec.m]

    def _spread_scales(self, part: PhaseTensor, spec: PhaseSpec) -> np.ndarray:
        """Return the part's scales as (tiles or 1, column tiles, units(, R))."""
        units = _by_unit(part.scales.astype(np.float32))  # (units, row tiles, column tiles)
        tiles = -(-part.n // self.rows)
        if spec.scale == "tensor":
            return units.transpose(1, 2, 0)
        if spec.scale == "row":
            padded = np.ones((len(units), tiles * self.rows), np.float32)
            padded[:, : part.n] = units[:, :, 0]
            return padded.reshape(len(units), tiles, 1, self.rows).transpose(1, 2, 0, 3)
        spread = units[:, np.arange(tiles) * self.rows // TILE]
        padded = np.ones((tiles, _padded_columns(spec) // TILE, len(units)), np.float32)
        padded[:, : spread.shape[2]] = spread.transpose(1, 2, 0)
        return padded

    def _gather_scales(self, packed: np.ndarray, rows: int, spec: PhaseSpec) -> np.ndarray:
        """Undo `_spread_scales`: -> (T, terms, 2, row tiles, column tiles)."""
        if spec.scale == "tensor":
            units = packed[:1].transpose(2, 0, 1)
        elif spec.scale == "row":
            units = packed[:, 0].transpose(1, 0, 2).reshape(packed.shape[2], -1, 1)[:, :rows]
        else:
            per_tile = packed[:: TILE // self.rows, : -(-spec.m // TILE)]
            units = per_tile.transpose(2, 0, 1)
        shape = (len(spec.terms), spec.stages, 2, *units.shape[1:])
        return np.ascontiguousarray(units.reshape(shape).swapaxes(0, 1))


def _padded_columns(spec: PhaseSpec) -> int:
    return -(-spec.m // ACT_GROUP) * ACT_GROUP


def _by_unit(scales: np.ndarray) -> np.ndarray:
    """Reorder (T, terms, 2, row tiles, column tiles) to (units, row tiles, column tiles)."""
    return scales.swapaxes(0, 1).reshape(-1, *scales.shape[3:])


def _code_places(terms: int, stages: int) -> list[tuple[int, int, Code]]:
    """Return (shift, plane, code) of every code of a step."""
    return [
        (4 * (i % 2) + 2 * slot, i // 2, code)
        for i, pair in enumerate(nibbles(terms, stages))
        for slot, code in enumerate(pair)
    ]
