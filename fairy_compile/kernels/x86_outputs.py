"""TIR that stores a row tile's results, whatever part of a fused call it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import span, store
from fairy_compile.op import PhaseSpec

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer


class RowTileOutputs:
    """Where a row tile's Re and Im rows go in y, float32 (b, 2n).

    Make it inside the loop over row tiles: it emits the tile's position once.
    """

    def __init__(self, spec: PhaseSpec, lanes: int, y: Buffer, tile: Expr) -> None:
        self._y, self._lanes = y, lanes
        self._even = all(n % lanes == 0 for n in spec.parts)
        self._re, self._im, self._left = (T.bind(v) for v in _position(spec, lanes, tile))

    def store(
        self, token: Expr | int, halves: Sequence[Buffer], first: Sequence[Expr | int] = (0, 0)
    ) -> None:
        """Store a token's Re and Im rows, which begin at the elements ``first`` of ``halves``.

        They are stored as vectors, or row by row in the last tile of an uneven part.
        """
        lanes = self._lanes
        for feature, values, at in zip((self._re, self._im), halves, first, strict=True):
            whole = values[span(at, lanes)]
            if self._even:
                store(self._y, (token, span(feature, lanes)), whole)
                continue
            with T.If(self._left >= lanes):
                with T.Then():
                    store(self._y, (token, span(feature, lanes)), whole)
                with T.Else(), T.serial(0, self._left) as i:
                    store(self._y, (token, feature + i), values[at + i])


def _position(spec: PhaseSpec, lanes: int, tile: Expr) -> tuple[Expr, Expr, Expr]:
    """Return a tile's first Re and Im output features, and the rows left in its part."""
    first_tile, position = 0, None
    for _, rows, feature in spec.output_runs():
        row = (tile - first_tile) * lanes
        here: tuple[Any, Any, Any] = (feature + row, feature + rows + row, rows - row)
        if position is not None:
            pairs = zip(here, position, strict=True)
            here = tuple(T.Select(tile >= first_tile, new, old) for new, old in pairs)
        position = here
        first_tile += -(-rows // lanes)
    return position
