"""The phase GEMM of many rows of x: `gpu_tile` over decoded tiles of complex rows.

A tile of 64 features is 32 complex rows, real parts first; a step of 32 input features is one unit
of 16 complex columns, real halves first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import local, store, when
from fairy_compile.kernels.gpu_layout import UNIT
from fairy_compile.kernels.gpu_tile import DEPTH, GROUP, OUTPUTS, TileGemm, tile_dtype
from fairy_compile.kernels.gpu_weights import Weights

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

ROWS = OUTPUTS // 2
# Columns that one thread decodes; even, so that they share a word.
_COLUMNS = ROWS * UNIT // GROUP


def phase_tile_gemm(
    weights: Weights, y: Buffer, tokens: int, kind: Callable[..., TileGemm] = TileGemm
) -> TileGemm:
    """Return the launch of a phase GEMM by a ``kind`` of tile; ``y`` is (batch, 2n)."""
    return kind(
        outputs=-(-weights.spec.n // ROWS),
        steps=weights.units,
        tokens=tokens,
        dtype=tile_dtype(weights.spec.dtype),
        fill_weight=lambda *at: _fill_weight(weights, *at),
        x_column=lambda step, depth: _x_column(weights, step, depth),
        write=lambda *at: _write(weights, y, *at),
    )


def _fill_weight(weights: Weights, tile: Buffer, block: Expr, step: Expr, thread: Expr) -> None:
    spec, dtype = weights.spec, tile_dtype(weights.spec.dtype)
    per_row = UNIT // _COLUMNS
    own = T.bind(T.floordiv(thread, per_row))
    row = T.bind(T.min(block * ROWS + own, spec.n - 1))
    column = T.bind(T.floormod(thread, per_row) * _COLUMNS)
    scales, values = local((weights.planes * 2,), "uint32"), local((4,))
    words = local((len(weights.slots),), "uint32")
    weights.load_scales(scales, 0, row, step)
    for i, (k, t, stages) in enumerate(weights.slots):
        width = 2 * stages
        per = 32 // width
        word = step * weights.planes + k * spec.stages + t + T.floordiv(column, per)
        shift = T.cast(T.floormod(column, per) * width, "uint32")
        store(words, i, T.shift_right(weights.codes[row, word], shift))
    for c in range(_COLUMNS):
        bits = [(words[i], c * 2 * stages) for i, (_, _, stages) in enumerate(weights.slots)]
        weights.block(bits, scales, 0, values)
        for half_out in range(2):
            for half_in in range(2):
                value = values[2 * half_out + half_in]
                at = (half_in * UNIT + column + c, half_out * ROWS + own)
                store(tile, at, value if dtype == "float32" else T.cast(value, dtype))


def _x_column(weights: Weights, step: Expr, depth: Expr) -> tuple[Expr, Any]:
    m = weights.spec.m
    half = T.floordiv(depth, DEPTH // 2)
    column = T.bind(step * UNIT + T.floormod(depth, UNIT))
    first = T.bind(half * m + column)
    return first, None if m % UNIT == 0 else (lambda c: column + c < m)


def _write(
    weights: Weights, y: Buffer, token: Expr, block: Expr, feature: Expr, value: Expr
) -> None:
    spec = weights.spec
    row = T.bind(block * ROWS + T.floormod(feature, ROWS))
    with when(row < spec.n):
        re, im = weights.feature(row)
        at = T.Select(feature < ROWS, re, im)
        out = value if spec.out_dtype == "float32" else T.cast(value, spec.out_dtype)
        store(y, (token, at), out)
