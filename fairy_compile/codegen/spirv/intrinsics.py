"""Lowering rules of intrinsics for target ``vulkan``: what TVM's LowerIntrin pass turns them into.

Without them TVM falls back to calls of the C library. Most operators are one instruction of
GLSL.std.450; the rest is spelled out with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Op
from tvm.tirx import register_intrin_lowering

from fairy_compile.codegen.spirv.enums import Glsl

_PRIORITY = 99
_NAMESPACES = ("tirx.", "prim.")

GLSL_FUNCTIONS = {
    "round": Glsl.RoundEven,
    "nearbyint": Glsl.RoundEven,
    "trunc": Glsl.Trunc,
    "fabs": Glsl.FAbs,
    "floor": Glsl.Floor,
    "ceil": Glsl.Ceil,
    "sin": Glsl.Sin,
    "cos": Glsl.Cos,
    "tan": Glsl.Tan,
    "asin": Glsl.Asin,
    "acos": Glsl.Acos,
    "atan": Glsl.Atan,
    "sinh": Glsl.Sinh,
    "cosh": Glsl.Cosh,
    "tanh": Glsl.Tanh,
    "asinh": Glsl.Asinh,
    "acosh": Glsl.Acosh,
    "atanh": Glsl.Atanh,
    "atan2": Glsl.Atan2,
    "pow": Glsl.Pow,
    "exp": Glsl.Exp,
    "exp2": Glsl.Exp2,
    "log": Glsl.Log,
    "log2": Glsl.Log2,
    "sqrt": Glsl.Sqrt,
    "rsqrt": Glsl.InverseSqrt,
    "fma": Glsl.Fma,
}
"""TIR operators that are one instruction of GLSL.std.450."""


def register_lowering_rules() -> None:
    """Register the rules for target ``vulkan``. Calling it again changes nothing."""
    rules: dict[str, Callable[[Any], Any]] = {
        name: _glsl_rule(instruction) for name, instruction in GLSL_FUNCTIONS.items()
    }
    rules |= {
        "erf": lambda call: _erf(call.args[0]),
        "log10": lambda call: _times(tirx.log2(call.args[0]), math.log10(2)),
        "log1p": lambda call: _log1p(call.args[0]),
        "exp10": lambda call: tirx.exp2(_times(call.args[0], math.log2(10))),
        "hypot": lambda call: tirx.sqrt(call.args[0] * call.args[0] + call.args[1] * call.args[1]),
        "copysign": lambda call: _copysign(*call.args),
    }
    existing = set(Op.list_op_names())
    for name, rule in rules.items():
        for namespace in _NAMESPACES:
            if namespace + name in existing:
                register_intrin_lowering(namespace + name, target="vulkan", f=rule, level=_PRIORITY)


def _glsl_rule(instruction: Glsl) -> Callable[[Any], Any]:
    def rule(call: Any) -> Any:
        number = tirx.const(int(instruction), "uint32")
        return tirx.call_intrin(call.ty.dtype, "tirx.call_spirv_pure_glsl450", number, *call.args)

    return rule


def _times(value: Any, factor: float) -> Any:
    return value * tirx.const(factor, value.ty.dtype)


def _log1p(x: Any) -> Any:
    """log(1 + x), corrected for what rounding 1 + x lost (Higham, Accuracy and Stability, 1.14)."""
    one = tirx.const(1, x.ty.dtype)
    rounded = one + x
    return tirx.Select(rounded == one, x, tirx.log(rounded) * x / (rounded - one))


def _copysign(magnitude: Any, sign: Any) -> Any:
    """Magnitude of one number with the sign bit of another."""
    dtype = magnitude.ty.dtype
    bits = dtype.bits
    integer = f"uint{bits}" if dtype.lanes == 1 else f"uint{bits}x{dtype.lanes}"
    top = tirx.const(1 << (bits - 1), integer)
    rest = tirx.const((1 << (bits - 1)) - 1, integer)
    merged = tirx.bitwise_or(
        tirx.bitwise_and(tirx.reinterpret(integer, magnitude), rest),
        tirx.bitwise_and(tirx.reinterpret(integer, sign), top),
    )
    return tirx.reinterpret(dtype, merged)


# erf(x) = x P(x^2) / Q(x^2) on [-4, 4], where it reaches 1 in float32; highest power first. The
# rational approximation that TVM's fast_erf uses on other targets.
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_ERF_RANGE = 4.0


def _erf(x: Any) -> Any:
    """Error function, within 5e-7 in float32; computed in float32 for float16."""
    dtype = x.ty.dtype
    single = "float32" if dtype.lanes == 1 else f"float32x{dtype.lanes}"
    if dtype.bits == 16:
        return tirx.Cast(dtype, _erf(tirx.Cast(single, x)))
    limit = tirx.const(_ERF_RANGE, dtype)
    clamped = tirx.max(tirx.min(x, limit), -limit)
    square = clamped * clamped
    return clamped * _polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square)


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    """Horner's rule, highest power first."""
    result = tirx.const(coefficients[0], x.ty.dtype)
    for coefficient in coefficients[1:]:
        result = result * x + tirx.const(coefficient, x.ty.dtype)
    return result
