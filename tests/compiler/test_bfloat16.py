"""bfloat16 in values that are bound to names, before TVM lowers it."""

from __future__ import annotations

import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.script import builder as T

from fairy_compile.compiler.bfloat16 import widen_bound_values
from fairy_compile.kernels.gpu_builder import build_function, load_float, store


def function(bind) -> tvm.IRModule:
    """Return y = what ``bind`` binds of x."""

    def body() -> None:
        x = T.arg("x", T.buffer((8,), "bfloat16"))
        y = T.arg("y", T.buffer((8,), "float32"))
        bind(x, y)

    return tvm.IRModule({"main": build_function("main", body)})


def casts(module: tvm.IRModule) -> list[str]:
    """Return what is cast, from which dtype."""
    found = []

    def visit(cast: tirx.Cast, visitor) -> None:
        found.append(f"{cast.value.ty.dtype} {cast.ty.dtype}")
        visitor.default_visit(cast)

    tvm_ffi.structural_visit(module["main"].body, [(tirx.Cast, visit)])
    return found


def test_bound_values_are_widened_by_their_bits() -> None:
    def bind(x, y) -> None:
        one = T.bind(T.if_then_else(y[0] > T.float32(0), load_float(x, 3), T.float32(0)))
        store(y, 3, one)
        four = T.bind(T.cast(x[T.ramp(4, 1, 4)], "float32x4"))
        store(y, T.ramp(4, 1, 4), four)

    module = widen_bound_values()(function(bind))
    assert casts(module) == ["uint16 uint32", "uint16x4 uint32x4"]


def test_other_values_are_left_to_tvm() -> None:
    def bind(x, y) -> None:
        store(y, 0, load_float(x, 0))
        other = T.bind(T.cast(y[0], "int32"))
        store(y, 1, T.cast(other, "float32"))

    module = function(bind)
    assert tvm_ffi.structural_equal(widen_bound_values()(module), module)
    assert casts(widen_bound_values()(module)) == casts(module)


@pytest.mark.parametrize(
    "value", [lambda x: x[0], lambda x: T.cast(x[0] + x[1], "float32")], ids=["number", "sum"]
)
def test_what_would_be_computed_wrong_is_refused(value) -> None:
    def bind(x, y) -> None:
        bound = T.bind(value(x))
        store(y, 0, T.cast(bound, "float32"))

    with pytest.raises(RuntimeError, match="value in bfloat16"):
        widen_bound_values()(function(bind))
