"""What lies between the linear layers of a Relax model, by target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from fairy_compile.kernels import cuda_gate, cuda_norm, elementwise_gpu
from fairy_compile.kernels.attention_cpu import vector_unit
from fairy_compile.kernels.base import Activation, Batch
from fairy_compile.kernels.elementwise_cpu import (
    GELU_CUBIC,
    GELU_SCALE,
    build_gate_product,
    build_layer_norm,
    build_regroup_heads,
    build_relu2_product,
    build_rms_norm,
    build_token_rounding,
)
from fairy_compile.models.shapes import product
from fairy_compile.op import ACT_GROUP
from fairy_compile.op.token_int8 import GUARDS, LEVELS, MIN_PEAK, VALUES, guarded_columns

if TYPE_CHECKING:
    from fairy_compile.targets import Target


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight float32 (size,).

    Attributes:
        offset: what is added to the checkpoint's weights when a library's are written.
    """

    offset = 0.0

    def __init__(self, size: int, eps: float, target: Target) -> None:
        self.weight = nn.Parameter((size,), "float32")
        self.size, self.eps, self.target = size, eps, target

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., size), keeping its dtype."""
        return rms_norm(x, self.weight, self.eps, self.target)


class OffsetRMSNorm(RMSNorm):
    """An `RMSNorm` whose checkpoint holds weights less one (Gemma)."""

    offset = 1.0


def rms_norm(x: Tensor, weight: Tensor, eps: float, target: Target) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight of x (..., size), in the dtype of x."""
    size = int(x.shape[-1])

    def build(batch: Batch) -> tirx.PrimFunc:
        if target.device == "cuda" and cuda_norm.serves(size, x.dtype):
            return cuda_norm.build_rms_norm(size, eps, x.dtype, batch)
        if target.is_gpu:
            return elementwise_gpu.build_rms_norm(size, eps, x.dtype, batch)
        return build_rms_norm(size, eps, vector_unit(target), batch)

    return _per_row(build, f"rms_norm_{size}", x, [weight], size)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Weight and bias are float32 (size,).
    """

    def __init__(self, size: int, eps: float, target: Target) -> None:
        self.weight = nn.Parameter((size,), "float32")
        self.bias = nn.Parameter((size,), "float32")
        self.eps, self.target = eps, target

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., size), keeping its dtype."""
        return layer_norm(x, [self.weight, self.bias], self.eps, self.target)


def layer_norm(x: Tensor, parameters: list[Tensor], eps: float, target: Target) -> Tensor:
    """Normalise x (..., size) in its dtype; ``parameters`` are weight and bias, or none."""
    size, scaled = int(x.shape[-1]), bool(parameters)

    def build(batch: Batch) -> tirx.PrimFunc:
        if target.is_gpu:
            return elementwise_gpu.build_layer_norm(size, eps, x.dtype, batch, scaled=scaled)
        return build_layer_norm(size, eps, vector_unit(target), batch, scaled=scaled)

    name = f"layer_norm_{size}" + ("" if scaled else "_plain")
    return _per_row(build, name, x, parameters, size)


def gate_product(gate_up: Tensor, activation: Activation, target: Target) -> Tensor:
    """Return activation(gate) * up of gate_up (..., 2 size), gate first -> (..., size)."""
    size = int(gate_up.shape[-1]) // 2
    name = f"{activation}_product"
    rows = product(gate_up.shape[:-1])
    if target.device == "cuda" and rows == 1 and cuda_gate.serves(size, gate_up.dtype):
        func = cuda_gate.build_gate_product(activation, size, gate_up.dtype)
        return _per_row(lambda _: func, f"{name}_{size}", gate_up, [], size)
    if target.is_gpu:
        return op.tensor_expr_op(lambda a: _gate_product(a, activation), name, [gate_up])

    def build(batch: Batch) -> tirx.PrimFunc:
        return build_gate_product(activation, size, vector_unit(target), batch)

    return _per_row(build, f"{name}_{size}", gate_up, [], size)


def _gate_product(gate_up: te.Tensor, activation: Activation) -> te.Tensor:
    size = gate_up.shape[-1] // 2
    one = tirx.const(1, "float32")

    def product(*at: Any) -> Any:
        gate = tirx.Cast("float32", gate_up[at])
        up = tirx.Cast("float32", gate_up[(*at[:-1], at[-1] + size)])
        argument = gate
        if activation == "gelu_tanh":
            cubic, scale = (tirx.const(v, "float32") for v in (GELU_CUBIC, GELU_SCALE))
            argument = gate * (gate * gate * cubic + one) * scale
        return tirx.Cast(gate_up.dtype, gate / (one + te.exp(-argument)) * up)

    return te.compute((*gate_up.shape[:-1], size), product, name=f"{activation}_product")


def split(x: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
    """Return the parts of x of ``sizes`` along ``axis``, each by a function of its own.

    Relax's own split is one function with several loops, which passes cannot give to threads.
    """
    axis %= x.ndim
    parts, first = [], 0
    for size in sizes:

        def define(a: te.Tensor, first: int = first, size: int = size) -> te.Tensor:
            shape = [*a.shape[:axis], size, *a.shape[axis + 1 :]]

            def value(*at: Any) -> Any:
                return a[(*at[:axis], at[axis] + first, *at[axis + 1 :])]

            return te.compute(shape, value, name="part")

        parts.append(op.tensor_expr_op(define, "part", [x]))
        first += size
    return parts


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Return cap tanh(x / cap) of float32 x (Gemma 2, arXiv 2408.00118, section 2)."""

    def define(a: te.Tensor) -> te.Tensor:
        c = tirx.const(cap, "float32")
        return te.compute(a.shape, lambda *at: c * te.tanh(a[at] / c), name="soft_cap")

    return op.tensor_expr_op(define, "soft_cap", [x])


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Return x (..., n) + bias float32 (n,), summed in float32, in the dtype of x."""
    if x.dtype == "float32":
        return x + bias
    return (x.astype("float32") + bias).astype(x.dtype)


def relu2_product(gate_up: Tensor, target: Target) -> Tensor:
    """Return conj(a) up with a = (re², im²) of the gate, 0 where both parts are negative.

    float32 gate_up (..., [re gate, im gate, re up, im up]) -> (..., [re, im]).
    """
    size = int(gate_up.shape[-1]) // 4
    if target.is_gpu:
        return op.tensor_expr_op(_relu2_product, "relu2_product", [gate_up])

    def build(batch: Batch) -> tirx.PrimFunc:
        return build_relu2_product(size, vector_unit(target), batch)

    return _per_row(build, f"relu2_product_{size}", gate_up, [], 2 * size)


def _relu2_product(gate_up: te.Tensor) -> te.Tensor:
    *lead, width = gate_up.shape
    n, zero = int(width) // 4, tirx.const(0, "float32")

    def value(*at: Any) -> Any:
        column, imag = at[-1] % n, at[-1] >= n
        re, im, up_re, up_im = (gate_up[(*at[:-1], k * n + column)] for k in range(4))
        # re² one + im² other is the real, or the imaginary part.
        one, other = tirx.Select(imag, up_im, up_re), tirx.Select(imag, zero - up_re, up_im)
        return tirx.Select(te.max(re, im) < zero, zero, re * re * one + im * im * other)

    return te.compute((*lead, 2 * n), value, name="relu2_product")


def regroup_heads(
    x: Tensor, parts: Sequence[int], size: int, target: Target, *, to_heads: bool
) -> Tensor:
    """Bring [re of all heads, im of all heads] of each part to heads [re, im], or back.

    Args:
        x: float32 (..., 2 sum(parts) size), as is the result.
        parts: heads of each part.
        size: complex numbers of a head.
        target: what is compiled for.
        to_heads: from parts to heads; False for the way back.
    """
    name = f"{'split' if to_heads else 'join'}_heads_{'_'.join(map(str, parts))}"
    if target.is_gpu:
        return op.tensor_expr_op(lambda a: _regroup_heads(a, parts, size, to_heads), name, [x])

    def build(batch: Batch) -> tirx.PrimFunc:
        return build_regroup_heads(parts, size, to_heads, vector_unit(target), batch)

    return _per_row(build, name, x, [], int(x.shape[-1]))


def _regroup_heads(x: te.Tensor, parts: Sequence[int], size: int, to_heads: bool) -> te.Tensor:
    def value(*at: Any) -> Any:
        block, j = at[-1] // size, at[-1] % size
        source, first = None, 0
        for heads in parts:
            own = block - 2 * first
            if to_heads:
                here = own % 2 * heads + own // 2
            else:
                here = own % heads * 2 + own // heads
            here = 2 * first + here
            source = here if source is None else tirx.Select(own >= 0, here, source)
            first += heads
        return x[(*at[:-1], source * size + j)]

    return te.compute(x.shape, value, name="regroup_heads")


def round_tokens(x: Tensor, target: Target, *, guarded: bool) -> Tensor:
    """Round float32 x (..., 2m) to int8 a token, with guards where ``guarded``.

    `op.token_int8` defines it: `round_tokens` and `guard_activations`.
    """
    m = int(x.shape[-1]) // 2
    width = guarded_columns(m) if guarded else m
    name = f"round_tokens_{'guarded_' if guarded else ''}{m}"
    if target.is_gpu:
        return op.tensor_expr_op(lambda a: _round_tokens(a, m, guarded), name, [x])

    def build(batch: Batch) -> tirx.PrimFunc:
        return build_token_rounding(m, guarded, vector_unit(target), batch)

    return _per_row(build, name, x, [], 2 * width)


def _round_tokens(x: te.Tensor, m: int, guarded: bool) -> te.Tensor:
    lead = x.shape[:-1]
    width = guarded_columns(m) if guarded else m
    k = te.reduce_axis((0, m), "k")
    largest = te.compute(
        (*lead, 2), lambda *at: te.max(te.abs(x[(*at[:-1], at[-1] * m + k)]), axis=k), "largest"
    )

    def value(*at: Any) -> Any:
        row, half, column = at[:-1], at[-1] // width, at[-1] % width
        peak = te.max(largest[(*row, half)], tirx.const(MIN_PEAK, "float32"))
        s = tirx.const(1, "float32") / peak * tirx.const(LEVELS, "float32")

        def rounded(source: Any) -> Any:
            return te.nearbyint(x[(*row, half * m + source)] * s) / s

        if not guarded:
            return rounded(column)
        group, place = column // ACT_GROUP, column % ACT_GROUP
        source = group * VALUES + te.max(place - GUARDS, 0)
        guard = tirx.Select(place == 0, peak, tirx.const(0, "float32") - peak)
        return tirx.if_then_else(place < GUARDS, guard, rounded(source))

    return te.compute((*lead, 2 * width), value, "round_tokens")


def _per_row(
    build: Callable[[Batch], tirx.PrimFunc],
    name: str,
    x: Tensor,
    parameters: list[Tensor],
    out_size: int,
) -> Tensor:
    """Call a function of (rows, size) over all leading dimensions at once."""
    *lead, size = x.shape
    rows = product(lead)
    batch: Batch = "single" if isinstance(rows, int) and rows == 1 else "many"
    y = op.tensor_ir_op(
        build(batch).with_attr("op_pattern", 8),  # opaque to fusion: it is scheduled already
        f"{name}_{batch}",
        [op.reshape(x, (rows, size)), *parameters],
        Tensor.placeholder((rows, out_size), x.dtype),
    )
    return op.reshape(y, (*lead, out_size))
