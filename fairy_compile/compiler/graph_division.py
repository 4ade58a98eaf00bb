"""Divisions by zero in an imported graph.

Processors stop a program that divides integers by 0, or the least integer by -1. Divisors come
from whoever calls the library, so a quotient or remainder by 0 is 0 here, and the quotient by -1
is the negative number, which wraps around. Floats divide by a constant 0 as by any other 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax import BlockBuilder

from fairy_compile.errors import UnsupportedError

_QUOTIENTS = ("relax.divide", "relax.floor_divide")
_REMAINDERS = ("relax.mod", "relax.floor_mod")


def refuse_division(name: str, call: Any) -> None:
    """Refuse to divide integers by a constant 0, whose result nothing defines.

    Args:
        name: of the graph.
        call: any value of it.

    Raises:
        UnsupportedError: it is such a division.
    """
    operator = getattr(getattr(call, "op", None), "name", "")
    if operator not in _QUOTIENTS + _REMAINDERS or "int" not in str(call.ty.dtype):
        return
    divisor = call.args[1]
    if isinstance(divisor, tvm.ir.GenericConst) and (divisor.value.numpy() == 0).any():
        raise UnsupportedError(
            f"{name} divides integers by a constant 0 ({operator.removeprefix('relax.')}), which "
            "has no result; leave that operator out of the graph"
        )


def guard_division(builder: BlockBuilder, call: relax.Call) -> Any:
    """Return a division that no divisor stops; other calls as they are."""
    name = getattr(call.op, "name", "")
    if name not in _QUOTIENTS + _REMAINDERS:
        return call
    number, divisor = call.args
    dtype = str(call.ty.dtype)
    constant = divisor.value.numpy() if isinstance(divisor, tvm.ir.GenericConst) else None
    if "int" not in dtype:
        if constant is None or constant.ndim or float(constant):
            return call
        return _by_zero(builder, name, number, float(constant), dtype)
    if constant is not None and not np.isin(constant, (0, -1)).any():
        return call
    op, emit = relax.op, builder.emit
    zero = relax.const(0, dtype)
    by_zero = emit(op.equal(divisor, zero))
    special, other = by_zero, zero
    if not dtype.startswith("u"):
        by_minus_one = emit(op.equal(divisor, relax.const(-1, dtype)))
        special = emit(op.logical_or(by_zero, by_minus_one))
        if name in _QUOTIENTS:
            negative = emit(op.subtract(zero, number))
            other = emit(op.where(by_zero, zero, negative))
    safe = emit(op.where(special, relax.const(1, dtype), divisor))
    result = emit(relax.Call(call.op, [number, safe], call.attrs))
    return op.where(special, other, result)


def _by_zero(builder: BlockBuilder, name: str, number: Any, zero: float, dtype: str) -> Any:
    """Return a float divided by a constant 0, or the remainder, without a division.

    The compiler refuses to divide by a zero it sees. x / 0 is x times infinity for every x, of
    which none leaves a remainder.
    """
    factor = np.copysign(np.inf, zero) if name in _QUOTIENTS else np.nan
    value = relax.op.multiply(number, relax.const(factor, dtype))
    return relax.op.floor(builder.emit(value)) if name == "relax.floor_divide" else value
