"""bfloat16 on devices that have it in memory alone.

TVM computes with bfloat16 in float32 there and stores 16-bit integers; a number's bits are the
upper half of the float32 that it is. TVM 0.27 leaves out the values of bound names (`tirx.Bind`): a
cast that stands in one becomes a conversion of the integer. So those are spelled out before.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

_HALF = 16  # bits of a number


def widen_bound_values() -> Any:
    """Return a pass that widens bfloat16 in the values of bound names by its bits.

    Raises:
        RuntimeError: a value computes in bfloat16, or is of that type.
    """

    def widen(cast: tirx.Cast, mutator: Any) -> Any:
        cast = mutator.default_mutate(cast)
        source = cast.value
        if not isinstance(source, tvm.ir.TensorLoad) or _scalar(source) != "bfloat16":
            return cast
        lanes = _suffix(source)
        bits = tirx.Cast(f"uint32{lanes}", tirx.reinterpret(f"uint16{lanes}", source))
        shift = tirx.const(_HALF, f"uint32{lanes}")
        wide = tirx.reinterpret(f"float32{lanes}", tirx.shift_left(bits, shift))
        return wide if _scalar(cast) == "float32" else tirx.Cast(str(cast.ty.dtype), wide)

    def rewrite(bind: tirx.Bind, _mutator: Any) -> tirx.Bind:
        value = tvm_ffi.structural_mutate(bind.value, [(tirx.Cast, widen)])
        if _scalar(bind.var) == "bfloat16" or _computes(value):
            raise RuntimeError(f"{bind.var.name} is bound to a value in bfloat16: {bind.value}")
        return tirx.Bind(bind.var, value)

    @tirx.transform.prim_func_pass(opt_level=0, name="WidenBoundBFloat16")
    def run(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
        return func.with_body(tvm_ffi.structural_mutate(func.body, [(tirx.Bind, rewrite)]))

    return run


def _scalar(value: Any) -> str:
    return str(getattr(value.ty, "dtype", "")).partition("x")[0]


def _suffix(value: Any) -> str:
    _, x, lanes = str(value.ty.dtype).partition("x")
    return x + lanes


def _computes(value: Any) -> bool:
    """Tell whether a bfloat16 number is left that is not just taken for its bits."""
    found = []

    def visit(cast: tirx.Cast, visitor: Any) -> None:
        found.extend([cast] if "bfloat16" in (_scalar(cast), _scalar(cast.value)) else [])
        visitor.default_visit(cast)

    tvm_ffi.structural_visit(value, [(tirx.Cast, visit)])
    return bool(found)
