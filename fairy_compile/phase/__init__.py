"""Phase quantisation in NumPy: widely-linear transform, residual rule, packed tensors."""

from fairy_compile.phase.alternating import quantize_alternating
from fairy_compile.phase.quantize import (
    FAIRY2I_MIN_SCALE,
    IFAIRY_MIN_SCALE,
    phase_codes,
    quantize,
    quantize_complex,
    quantize_complex_layer,
)
from fairy_compile.phase.tensor import PhaseTensor, pack_codes, tile_shape, unpack_codes
from fairy_compile.phase.widely_linear import as_float32, from_widely_linear, to_widely_linear

__all__ = [
    "FAIRY2I_MIN_SCALE",
    "IFAIRY_MIN_SCALE",
    "PhaseTensor",
    "as_float32",
    "from_widely_linear",
    "pack_codes",
    "phase_codes",
    "quantize",
    "quantize_alternating",
    "quantize_complex",
    "quantize_complex_layer",
    "tile_shape",
    "to_widely_linear",
    "unpack_codes",
]
