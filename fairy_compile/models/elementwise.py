"""RMSNorm and the gated activation of a Relax model: hand-made on CPUs, legalised elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from fairy_compile.kernels.attention_cpu import vector_unit
from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.elementwise_cpu import build_rms_norm, build_silu_product
from fairy_compile.models.linear import product

if TYPE_CHECKING:
    from fairy_compile.targets import Target


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; weight float32 (size,)."""

    def __init__(self, size: int, eps: float, target: Target) -> None:
        self.weight = nn.Parameter((size,), "float32")
        self.size, self.eps, self.target = size, eps, target

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of float32 x (..., size)."""
        if self.target.device != "cpu":
            return op.rms_norm(x, self.weight, axes=[-1], epsilon=self.eps)

        def build(batch: Batch) -> tirx.PrimFunc:
            return build_rms_norm(self.size, self.eps, vector_unit(self.target), batch)

        return _per_row(build, f"rms_norm_{self.size}", x, [self.weight], self.size)


def silu_product(gate_up: Tensor, target: Target) -> Tensor:
    """Return silu(gate) * up of float32 gate_up (..., 2 size), gate first -> (..., size)."""
    size = int(gate_up.shape[-1]) // 2
    if target.device != "cpu":
        gate, up = op.split(gate_up, 2, axis=-1)
        return op.silu(gate) * up

    def build(batch: Batch) -> tirx.PrimFunc:
        return build_silu_product(size, vector_unit(target), batch)

    return _per_row(build, f"silu_product_{size}", gate_up, [], size)


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
        Tensor.placeholder((rows, out_size), "float32"),
    )
    return op.reshape(y, (*lead, out_size))
