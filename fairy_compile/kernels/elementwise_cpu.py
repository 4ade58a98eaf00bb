"""What lies between matrix products and attention on CPUs, vectorised by hand.

Between two matrix-vector products a 2-bit model has little time to lose: LLVM leaves the float sum
of a norm and the exponential of an activation as scalar code, which on two threads costs more than
the quantisation of all activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_pages import parallel_tokens
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, span, splat, store
from fairy_compile.kernels.base import Activation, Batch
from fairy_compile.op import ACT_GROUP
from fairy_compile.op.token_int8 import GUARDS, LEVELS, MIN_PEAK, VALUES, guarded_columns

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

GELU_CUBIC = 0.044715
GELU_SCALE = 2 * math.sqrt(2 / math.pi)

# Enough sums to hide the latency of an addition.
_SUMS = 4
# Elements a thread should have to do for one row to be worth splitting: about 2 us of work.
_ELEMENTS_PER_TASK = 4096
# From these gates on activations are below 1e-35, and their exponentials still finite float32.
_VANISHES = {"silu": -87.0, "gelu_tanh": -10.0}


def build_rms_norm(size: int, eps: float, unit: VectorUnit, batch: Batch) -> PrimFunc:
    """Return ``rms_norm``: y = x / sqrt(mean(x²) + eps) * weight, row by row.

    Arguments: x float32 (b, size), weight float32 (size,), y float32 (b, size). Sums are float32 in
    partial sums (Zhang and Sennrich, arXiv 1910.07467, equation 4).
    """
    lanes = unit.dividing(size).lanes
    sums = math.gcd(size // lanes, _SUMS)

    def norm(row: Expr | int, x: Buffer, weight: Buffer, y: Buffer) -> None:
        squares = vec.zeros(sums, lanes)
        with T.serial(0, size // lanes // sums) as i:
            for k, total in enumerate(squares):
                value = T.bind(x[row, span((i * sums + k) * lanes, lanes)])
                whole = span(0, lanes)
                store(total, whole, total[whole] + value * value)
        total = sum((buffer[span(0, lanes)] for buffer in squares[1:]), squares[0][span(0, lanes)])
        mean = _first_lane(vec.lane_sums([total], lanes), lanes) / T.float32(size)
        factor = T.bind(T.float32(1) / T.sqrt(mean + T.float32(eps)))
        with T.serial(0, size // lanes) as i:
            at = span(i * lanes, lanes)
            store(y, (row, at), x[row, at] * splat(factor, lanes) * weight[at])

    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("rms_norm")
        _attributes()
        rows = _rows(batch)
        x = T.arg("x", T.buffer((rows, size), "float32"))
        weight = T.arg("weight", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((rows, size), "float32"))
        with T.sblock("root"):
            _each_row(batch, rows, lambda row: norm(row, x, weight, y))
    return ir.get().without_attr("global_symbol")


def build_layer_norm(
    size: int, eps: float, unit: VectorUnit, batch: Batch, *, scaled: bool
) -> PrimFunc:
    """Return ``layer_norm``: y = (x - mean) / sqrt(variance + eps) [* weight + bias], row by row.

    Arguments: x float32 (b, size); weight and bias float32 (size,) if ``scaled``; y float32 (b,
    size). The variance is the mean of squared differences (Ba, Kiros and Hinton, arXiv 1607.06450).
    """
    lanes = unit.dividing(size).lanes
    whole = span(0, lanes)

    def mean_of(value: Callable[[Expr], Expr]) -> Expr:
        (total,) = vec.zeros(1, lanes)
        with T.serial(0, size // lanes) as i:
            store(total, whole, total[whole] + value(T.bind(i * lanes)))
        return T.bind(_first_lane(vec.lane_sums([total[whole]], lanes), lanes) / T.float32(size))

    def norm(row: Expr | int, x: Buffer, parameters: list[Buffer], y: Buffer) -> None:
        mean = splat(mean_of(lambda at: x[row, span(at, lanes)]), lanes)

        def square(at: Expr) -> Expr:
            difference = T.bind(x[row, span(at, lanes)] - mean)
            return difference * difference

        factor = T.bind(T.float32(1) / T.sqrt(mean_of(square) + T.float32(eps)))
        with T.serial(0, size // lanes) as i:
            at = span(i * lanes, lanes)
            value = (x[row, at] - mean) * splat(factor, lanes)
            if parameters:
                weight, bias = parameters
                value = value * weight[at] + bias[at]
            store(y, (row, at), value)

    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("layer_norm")
        _attributes()
        rows = _rows(batch)
        x = T.arg("x", T.buffer((rows, size), "float32"))
        names = ("weight", "bias") if scaled else ()
        parameters = [T.arg(name, T.buffer((size,), "float32")) for name in names]
        y = T.arg("y", T.buffer((rows, size), "float32"))
        with T.sblock("root"):
            _each_row(batch, rows, lambda row: norm(row, x, parameters, y))
    return ir.get().without_attr("global_symbol")


def build_gate_product(
    activation: Activation, size: int, unit: VectorUnit, batch: Batch
) -> PrimFunc:
    """Return ``<activation>_product``: y = f(gate) * up, f(g) = g sigmoid(a(g)).

    silu has a(g) = g; gelu_tanh, the tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415),
    is the same with a(g) = 2 sqrt(2 / pi) (g + 0.044715 g³), since (1 + tanh x) / 2 is
    sigmoid(2 x). Arguments: gate_up float32 (b, 2 size), gate first; y float32 (b, size). Equal to
    exact arithmetic within about 1e-6 relative. A single row is split over threads.
    """
    lanes = unit.dividing(size).lanes

    def product(row: Expr | int, at: Expr, gate_up: Buffer, y: Buffer) -> None:
        vanishes = splat(_VANISHES[activation], lanes)
        gate = T.bind(T.max(gate_up[row, span(at, lanes)], vanishes))
        up = gate_up[row, span(at + size, lanes)]
        argument = gate
        if activation == "gelu_tanh":
            inner = gate * gate * splat(GELU_CUBIC, lanes) + splat(1.0, lanes)
            argument = gate * inner * splat(GELU_SCALE, lanes)
        power = vec.exp2(argument * splat(-math.log2(math.e), lanes), lanes)
        sigmoid = splat(1.0, lanes) / (splat(1.0, lanes) + power)
        store(y, (row, span(at, lanes)), gate * sigmoid * up)

    return _build_gate(f"{activation}_product", size, lanes, 1, product, batch)


def build_relu2_product(size: int, unit: VectorUnit, batch: Batch) -> PrimFunc:
    """Return ``relu2_product``: y = conj(a) up, a = (re², im²) of the gate, 0 where both are < 0.

    iFairy's activation (arXiv 2508.05571). Arguments: gate_up float32 (b, 4 size), re and im of the
    gate, then of up; y float32 (b, 2 size), re then im. A single row is split over threads.
    """
    lanes = unit.dividing(size).lanes

    def product(row: Expr | int, at: Expr, gate_up: Buffer, y: Buffer) -> None:
        parts = (T.bind(gate_up[row, span(at + k * size, lanes)]) for k in range(4))
        re, im, up_re, up_im = parts
        zeros = splat(0.0, lanes)
        negative = T.max(re, im) < zeros  # TVM binds no vector of bool
        a_re, a_im = (T.bind(T.Select(negative, zeros, part * part)) for part in (re, im))
        store(y, (row, span(at, lanes)), a_re * up_re + a_im * up_im)
        store(y, (row, span(at + size, lanes)), a_re * up_im - a_im * up_re)

    return _build_gate("relu2_product", size, lanes, 2, product, batch)


def _build_gate(
    name: str,
    size: int,
    lanes: int,
    halves: int,
    product: Callable[[Expr | int, Expr, Buffer, Buffer], None],
    batch: Batch,
) -> PrimFunc:
    """Return a function (gate_up, y) of product(row, first element, gate_up, y) for all vectors.

    gate_up is float32 (b, 2 halves size) and y (b, halves size).
    """
    vectors = size // lanes
    tasks = vec.divisor_at_most(vectors, max(1, halves * size // _ELEMENTS_PER_TASK))

    def row_of(row: Expr | int, first: Expr, count: int, gate_up: Buffer, y: Buffer) -> None:
        with T.serial(0, count) as i:
            product(row, T.bind((first + i) * lanes), gate_up, y)

    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name(name)
        _attributes()
        rows = _rows(batch)
        gate_up = T.arg("gate_up", T.buffer((rows, 2 * halves * size), "float32"))
        y = T.arg("y", T.buffer((rows, halves * size), "float32"))
        with T.sblock("root"):
            if batch == "single" and tasks > 1:
                with T.parallel(0, tasks) as task:
                    share = vectors // tasks
                    row_of(0, T.bind(task * share), share, gate_up, y)
            else:
                _each_row(batch, rows, lambda row: row_of(row, T.int32(0), vectors, gate_up, y))
    return ir.get().without_attr("global_symbol")


def build_regroup_heads(
    parts: Sequence[int], size: int, to_heads: bool, unit: VectorUnit, batch: Batch
) -> PrimFunc:
    """Return ``regroup_heads``: y holds the blocks of x in another order.

    What complex layers give, re of all heads of a part, then im of all, becomes heads [re, im] for
    attention, or the other way round. Arguments: x, y float32 (b, 2 sum(parts) size).

    Args:
        parts: heads of each part, e.g. of Q, K and V.
        size: complex numbers of a head.
        to_heads: from parts to heads; False for the way back.
        unit: vector registers.
        batch: rows.
    """
    lanes = unit.dividing(size).lanes
    width = 2 * sum(parts) * size

    def regroup(row: Expr | int, x: Buffer, y: Buffer) -> None:
        first = 0
        for heads in parts:
            with T.serial(0, heads) as head, T.serial(0, 2) as half:
                by_part = T.bind((2 * first + half * heads + head) * size)
                by_head = T.bind((2 * (first + head) + half) * size)
                source, place = (by_part, by_head) if to_heads else (by_head, by_part)
                with T.serial(0, size // lanes) as i:
                    block = x[row, span(source + i * lanes, lanes)]
                    store(y, (row, span(place + i * lanes, lanes)), block)
            first += heads

    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("regroup_heads")
        _attributes()
        rows = _rows(batch)
        x = T.arg("x", T.buffer((rows, width), "float32"))
        y = T.arg("y", T.buffer((rows, width), "float32"))
        with T.sblock("root"):
            _each_row(batch, rows, lambda row: regroup(row, x, y))
    return ir.get().without_attr("global_symbol")


def build_token_rounding(m: int, guarded: bool, unit: VectorUnit, batch: Batch) -> PrimFunc:
    """Return ``round_tokens``: see `op.token_int8`, equal to it bit for bit.

    Arguments: x float32 (b, 2m), y float32 (b, 2m), or (b, 2 guarded_columns(m)) where ``guarded``.
    """
    width = guarded_columns(m) if guarded else m
    values, stride = (VALUES, ACT_GROUP) if guarded else (m, m)
    first_value = GUARDS if guarded else 0
    whole, rest = divmod(m, values)

    def half_row(row: Expr | int, half: Expr, x: Buffer, y: Buffer) -> None:
        lowest = T.max(_largest_magnitude(row, half, x, m, unit), T.float32(MIN_PEAK))
        peak = T.bind(lowest)
        s = T.bind(T.float32(1) / peak * T.float32(LEVELS))

        def group(index: Expr | int, count: int) -> None:
            source = T.bind(half * m + index * values)
            target = T.bind(half * width + index * stride)
            if guarded:
                store(y, (row, target), peak)
                store(y, (row, target + 1), T.float32(0) - peak)
            with T.serial(0, count) as i:  # LLVM makes vectors of it
                # nearbyint rounds ties to even, as rint does.
                rounded = T.nearbyint(x[row, source + i] * s) / s
                store(y, (row, target + first_value + i), rounded)

        with T.serial(0, whole) as index:
            group(index, values)
        if rest:
            group(whole, rest)

    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("round_tokens")
        _attributes()
        rows = _rows(batch)
        x = T.arg("x", T.buffer((rows, 2 * m), "float32"))
        y = T.arg("y", T.buffer((rows, 2 * width), "float32"))

        def both_halves(row: Expr | int) -> None:
            with T.serial(0, 2) as half:
                half_row(row, half, x, y)

        with T.sblock("root"):
            _each_row(batch, rows, both_halves)
    return ir.get().without_attr("global_symbol")


def _largest_magnitude(row: Expr | int, half: Expr, x: Buffer, m: int, unit: VectorUnit) -> Expr:
    """Emit the search for max |x| of half a row of x (b, 2m)."""
    lanes = unit.dividing(m).lanes
    (largest,) = vec.zeros(1, lanes)
    all_lanes = span(0, lanes)
    with T.serial(0, m // lanes) as i:
        value = T.abs(x[row, span(half * m + i * lanes, lanes)])
        store(largest, all_lanes, T.max(largest[all_lanes], value))
    return vec.lane_max(largest[all_lanes], lanes)


# The root blocks are for Relax, which looks for reshapes in every function whose output has as many
# elements as its input, and expects a block there.


def _attributes() -> None:
    T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})


def _rows(batch: Batch) -> Expr | int:
    return 1 if batch == "single" else T.int64()


def _each_row(batch: Batch, rows: Expr | int, body: Callable[[Expr | int], None]) -> None:
    if batch == "single":
        body(0)
    else:
        parallel_tokens(rows, body)


def _first_lane(vector: Expr, lanes: int) -> Expr:
    return vector if lanes == 1 else T.bind(T.Shuffle([T.bind(vector)], [0]))
