"""Many rows of x: a GEMM whose weight tile is decoded into shared memory.

A thread group computes `OUTPUTS` features of ``tokens`` rows of x. In steps of `DEPTH` input
features it fills a tile of the weight and one of x, both with the depth first, and multiplies them;
every thread keeps a square of the outputs in registers, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import launch, local, shared, store, when
from fairy_compile.kernels.gpu_rows import Rows

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

OUTPUTS = 64
DEPTH = 32
SIDE = 16
"""Threads of a group along each side of its outputs."""
GROUP = SIDE * SIDE
_VECTOR = 4


def tile_dtype(dtype: str) -> str:
    """Return the dtype of tiles for x of ``dtype``.

    bfloat16 is widened as it is loaded: devices that take it in memory alone multiply in float32.
    """
    return "float32" if dtype == "bfloat16" else dtype


@dataclass(frozen=True)
class TileGemm:
    """One launch of y = x A^T.

    Attributes:
        outputs: number of groups of `OUTPUTS` features.
        steps: number of steps of `DEPTH` input features.
        tokens: rows of x of a thread group, a multiple of `SIDE`.
        dtype: of the tiles, see `tile_dtype`.
        fill_weight: fill_weight(tile, block, step, thread) fills tile[d, j].
        x_column: x_column(step, d) is the column of x at depth d, a multiple of 4, and tells
            whether columns from there on exist (None: always).
        write: write(token, block, j, value) stores an output; j is the feature in the tile.
    """

    outputs: int
    steps: int
    tokens: int
    dtype: str
    fill_weight: Callable[[Buffer, Expr, Expr, Expr], None]
    x_column: Callable[[Expr, Expr], tuple[Expr, Callable[[int], Expr] | None]]
    write: Callable[[Expr, Expr, Expr, Expr], None]

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread group."""
        return DEPTH * (OUTPUTS + self.tokens) * (2 if self.dtype == "float16" else 4)

    def emit(self, x: Buffer, rows: Rows) -> None:
        """Emit the launch for all rows of x."""
        extents = {
            "blockIdx.y": rows.groups(self.tokens),
            "blockIdx.x": self.outputs,
            "threadIdx.x": GROUP,
        }
        own = self.tokens // SIDE
        with launch(extents, rows.arguments) as (group, block, thread):
            tile = rows.tile(group, self.tokens)
            first, end = tile.first, tile.end
            weight_tile = shared((DEPTH, OUTPUTS), self.dtype)
            x_tile = shared((DEPTH, self.tokens), self.dtype)
            sums = local((own * _VECTOR,))
            for i in range(own * _VECTOR):
                store(sums, i, T.float32(0))
            column = T.bind(T.floormod(thread, SIDE))
            row = T.bind(T.floordiv(thread, SIDE))
            with T.serial(0, tile.turns(self.steps)) as step:
                self.fill_weight(weight_tile, block, step, thread)
                self._fill_x(x_tile, x, first, end, step, thread)
                self._multiply(weight_tile, x_tile, row, column, sums)
            for b in range(own):
                token = T.bind(first + row * own + b)
                with when(token < end):
                    for j in range(_VECTOR):
                        self.write(token, block, column * _VECTOR + j, sums[b * _VECTOR + j])

    def _fill_x(
        self, tile: Buffer, x: Buffer, first_token: Expr, end: Expr, step: Expr, thread: Expr
    ) -> None:
        pieces = DEPTH // _VECTOR
        values = local((_VECTOR,), self.dtype)
        for turn in range(self.tokens * pieces // GROUP):
            piece = T.bind(thread + turn * GROUP)
            depth = T.bind(T.floormod(piece, pieces) * _VECTOR)
            token = T.bind(T.floordiv(piece, pieces))
            source = T.bind(T.min(first_token + token, end - 1))
            first, inside = self.x_column(step, depth)
            if inside is None:
                loaded = x[source, T.ramp(first, 1, _VECTOR)]
                if str(x.dtype) != self.dtype:
                    loaded = T.cast(loaded, f"{self.dtype}x{_VECTOR}")
                store(values, T.ramp(0, 1, _VECTOR), loaded)
            else:
                for c in range(_VECTOR):
                    valid = inside(c)
                    value = x[source, T.if_then_else(valid, first + c, 0)]
                    if str(x.dtype) != self.dtype:
                        value = T.cast(value, self.dtype)
                    zero = T.cast(T.float32(0), self.dtype)
                    store(values, c, T.if_then_else(valid, value, zero))
            for c in range(_VECTOR):
                store(tile, (depth + c, token), values[c])

    def _multiply(
        self, weight_tile: Buffer, x_tile: Buffer, row: Expr, column: Expr, sums: Buffer
    ) -> None:
        own = self.tokens // SIDE
        weights, values = local((_VECTOR,)), local((own,))
        with T.serial(0, DEPTH) as d:
            self._load(weights, weight_tile, d, column, _VECTOR)
            self._load(values, x_tile, d, row, own)
            for b in range(own):
                for j in range(_VECTOR):
                    at = b * _VECTOR + j
                    store(sums, at, sums[at] + values[b] * weights[j])

    def _load(self, into: Buffer, tile: Buffer, d: Expr, at: Expr, count: int) -> None:
        value = tile[d, T.ramp(at * count, 1, count)]
        if self.dtype != "float32":
            value = T.cast(value, f"float32x{count}")
        store(into, T.ramp(0, 1, count), value)
