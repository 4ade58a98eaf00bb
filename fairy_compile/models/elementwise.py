"""RMSNorm, the gated activation and additions of a Relax model, by target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from fairy_compile.kernels import elementwise_gpu
from fairy_compile.kernels.attention_cpu import vector_unit
from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.elementwise_cpu import build_rms_norm, build_silu_product
from fairy_compile.models.shapes import product

if TYPE_CHECKING:
    from fairy_compile.targets import Target


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight float32 (size,)."""

    def __init__(self, size: int, eps: float, target: Target) -> None:
        self.weight = nn.Parameter((size,), "float32")
        self.size, self.eps, self.target = size, eps, target

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x (..., size), keeping its dtype."""

        def build(batch: Batch) -> tirx.PrimFunc:
            if self.target.is_gpu:
                return elementwise_gpu.build_rms_norm(self.size, self.eps, x.dtype, batch)
            return build_rms_norm(self.size, self.eps, vector_unit(self.target), batch)

        return _per_row(build, f"rms_norm_{self.size}", x, [self.weight], self.size)


def silu_product(gate_up: Tensor, target: Target) -> Tensor:
    """Return silu(gate) * up of gate_up (..., 2 size), gate first -> (..., size)."""
    size = int(gate_up.shape[-1]) // 2
    if target.is_gpu:
        return op.tensor_expr_op(_silu_product, "silu_product", [gate_up])

    def build(batch: Batch) -> tirx.PrimFunc:
        return build_silu_product(size, vector_unit(target), batch)

    return _per_row(build, f"silu_product_{size}", gate_up, [], size)


def _silu_product(gate_up: te.Tensor) -> te.Tensor:
    size = gate_up.shape[-1] // 2

    def product(*at: Any) -> Any:
        gate = tirx.Cast("float32", gate_up[at])
        up = tirx.Cast("float32", gate_up[(*at[:-1], at[-1] + size)])
        one = tirx.const(1, "float32")
        return tirx.Cast(gate_up.dtype, gate / (one + te.exp(-gate)) * up)

    return te.compute((*gate_up.shape[:-1], size), product, name="silu_product")


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Return x (..., n) + bias float32 (n,), summed in float32, in the dtype of x."""
    if x.dtype == "float32":
        return x + bias
    return (x.astype("float32") + bias).astype(x.dtype)


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
