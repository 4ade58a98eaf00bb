"""The operator: `phase_gemm`, its specification, and its NumPy reference."""

from fairy_compile.op.reference import (
    ACT_GROUP,
    ACT_LEVELS,
    dequantize_activations,
    phase_gemm_reference,
    quantize_activations,
)
from fairy_compile.op.spec import PhaseSpec

__all__ = [
    "ACT_GROUP",
    "ACT_LEVELS",
    "PhaseSpec",
    "dequantize_activations",
    "phase_gemm_reference",
    "quantize_activations",
]
