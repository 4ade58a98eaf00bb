"""The phase GEMM as one tensor expression: the definition every schedule starts from.

y[b, j] = sum_{h', c} x[b, h', c] A[j, h', c] with A the real matrix of the fused parts. Row j of A
belongs to complex row i and output half h (0 real, 1 imaginary); column (h', c) to complex column c
and input half h'. From the block form of U and W (see `phase.widely_linear`) an entry needs only
one axis of a code: the real one where h = h', else the imaginary one:

    A[j, h', c] = sum_t,term  sign(term, h, h') [code & 1 == axis] (1 - (code & 2)) s[t, term, axis]

    sign(U, h, h') = -1 for (0, 1) else +1         sign(W, h, h') = -1 for (1, 1) else +1

Codes are read in the `quarters` order of `kernels.generic`, which lets a vector of bytes decode to
four contiguous vectors of columns.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from fairy_compile.op.spec import PhaseSpec


def _row_of(j: Any, spec: PhaseSpec) -> tuple[Any, Any]:
    """Return (complex row, output half) of output feature j; parts lie side by side."""
    row, half = None, None
    for first, rows, feature in reversed(spec.output_runs()):
        inside = j - feature
        in_imag = tirx.Cast("int32", inside >= rows)
        this = (first + inside - in_imag * rows, in_imag)
        if row is None:
            row, half = this
        else:
            before_next = j < feature + 2 * rows
            row = tirx.Select(before_next, this[0], row)
            half = tirx.Select(before_next, this[1], half)
    return row, half


def phase_gemm(
    x: te.Tensor,
    codes: te.Tensor,
    scales: te.Tensor,
    spec: PhaseSpec,
    scale_tile: tuple[int, int],
) -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    """Define y = phase_gemm(x).

    Args:
        x: float32 (batch, 2m); batch may be symbolic.
        codes: uint8 (T, terms, n, quarter); byte q of row i holds columns q, quarter + q,
            2 quarter + q, 3 quarter + q in bits 0-1, 2-3, 4-5, 6-7; columns from m on are padding.
        scales: float32 (T, terms, 2, n_tiles, m_tiles).
        spec: shape and contract of the call; ``spec.act`` must be ``float``.
        scale_tile: complex (rows, columns) that share a scale.

    Returns:
        (y, weight, x_padded): y float32 (batch, 2n); weight and x_padded are the stages a schedule
        places: float32 (2n, 2, 4, quarter) and (batch, 2, 4, quarter).
    """
    batch, m = x.shape[0], spec.m
    quarter = int(codes.shape[3])
    last_tile = int(scales.shape[4]) - 1
    one = tirx.const(1, "float32")

    def padded(b: Any, half: Any, q: Any, j: Any) -> Any:
        column = q * quarter + j
        inside = x[b, half * m + column]
        if 4 * quarter == m:
            return inside
        return tirx.if_then_else(column < m, inside, tirx.const(0, "float32"))

    def entry(j: Any, half_in: Any, q: Any, byte: Any) -> Any:
        row, half_out = _row_of(j, spec)
        column = q * quarter + byte
        # Padding columns read the last tile's scale; their x is 0, but 0 * garbage may be NaN.
        column_tile = te.min(column // scale_tile[1], last_tile) if last_tile else 0
        axis = tirx.bitwise_xor(half_out, half_in)
        total = tirx.const(0, "float32")
        for t in range(spec.stages):
            for k, term in enumerate(spec.terms):
                packed = tirx.Cast("int32", codes[t, k, row, byte])
                code = tirx.bitwise_and(tirx.shift_right(packed, 2 * q), 3)
                hit = tirx.Cast("int32", tirx.bitwise_and(code, 1) == axis)
                value = hit * (1 - tirx.bitwise_and(code, 2))
                scale = scales[t, k, axis, row // scale_tile[0], column_tile]
                flipped = (1 - half_out) * half_in if term == "U" else half_out * half_in
                sign = one - tirx.Cast("float32", 2 * flipped)
                total = total + tirx.Cast("float32", value) * (scale * sign)
        return total

    x_padded = te.compute((batch, 2, 4, quarter), padded, name="x_padded")
    weight = te.compute((spec.out_features, 2, 4, quarter), entry, name="weight")
    h = te.reduce_axis((0, 2), "h")
    q = te.reduce_axis((0, 4), "q")
    c = te.reduce_axis((0, quarter), "c")
    y = te.compute(
        (batch, spec.out_features),
        lambda b, j: te.sum(x_padded[b, h, q, c] * weight[j, h, q, c], axis=[h, q, c]),
        name="y",
    )
    return y, weight, x_padded
