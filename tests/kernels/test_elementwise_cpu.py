"""RMSNorm and the gated activation against NumPy in float64; rounding is in test_token_int8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm

from fairy_compile.kernels.attention_cpu_vector import vector_unit
from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.elementwise_cpu import (
    build_gate_product,
    build_regroup_heads,
    build_relu2_product,
    build_rms_norm,
)
from fairy_compile.targets import load_target

EPS32 = float(np.finfo(np.float32).eps)
ROWS = [1, 2, 17]
SIZES = [1, 7, 48, 344, 4096, 11008]


def run(func: Any, output: tuple[int, ...], *arrays: np.ndarray, target: str = "cpu") -> np.ndarray:
    named = func.with_attr("global_symbol", "main")
    compiled = tvm.compile(named, target=load_target(target).to_tvm())["main"]
    y = tvm.runtime.tensor(np.full(output, np.nan, np.float32))
    compiled(*(tvm.runtime.tensor(a) for a in arrays), y)
    return y.numpy()


def batch_of(rows: int) -> Batch:
    return "single" if rows == 1 else "many"


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(rows: int, size: int) -> None:
    rng = np.random.default_rng([rows, size])
    x = (rng.standard_normal((rows, size)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype("f4")
    weight = rng.standard_normal(size).astype(np.float32)
    unit = vector_unit(load_target("cpu"))
    y = run(build_rms_norm(size, 1e-5, unit, batch_of(rows)), x.shape, x, weight)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    # The sum of squares errs by size eps at most, the root by half of it; four more roundings.
    assert (np.abs(y - expected) <= (size / 2 + 4) * EPS32 * np.abs(expected)).all()


def test_rms_norm_of_zeros_is_zero() -> None:
    unit = vector_unit(load_target("cpu"))
    y = run(
        build_rms_norm(64, 1e-5, unit, "single"),
        (1, 64),
        np.zeros((1, 64), "f4"),
        np.ones(64, "f4"),
    )
    assert not y.any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_product(rows: int, size: int, activation: str) -> None:
    rng = np.random.default_rng([rows, size, 1])
    gate_up = (rng.standard_normal((rows, 2 * size)) * 8).astype(np.float32)
    unit = vector_unit(load_target("cpu"))
    function = build_gate_product(activation, size, unit, batch_of(rows))
    y = run(function, (rows, size), gate_up)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    argument = gate
    if activation == "gelu_tanh":
        argument = 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    expected = gate / (1 + np.exp(-argument)) * up
    # exp2 errs by 2e-7 and by the roundings of its argument, |argument| log2(e) eps ln 2 =
    # |argument| eps each: one, or five with the cubic; five more roundings. Where the activation
    # vanishes it is held at a value below 1e-35.
    roundings = 1 if activation == "silu" else 5
    bound = (2e-7 + (roundings * np.abs(argument) + 5) * EPS32) * np.abs(expected) + 1e-35
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_relu2_product(rows: int, size: int) -> None:
    rng = np.random.default_rng([rows, size, 2])
    gate_up = (rng.standard_normal((rows, 4 * size)) * 8).astype(np.float32)
    gate_up[:, ::3] = np.abs(gate_up[:, ::3]) * 0  # zeros are not negative
    unit = vector_unit(load_target("cpu"))
    y = run(build_relu2_product(size, unit, batch_of(rows)), (rows, 2 * size), gate_up)
    re, im, up_re, up_im = np.split(gate_up.astype(np.float64), 4, axis=1)
    kept = ~((re < 0) & (im < 0))
    expected = np.conj(kept * re**2 + 1j * kept * im**2) * (up_re + 1j * up_im)
    seen = y[:, :size] + 1j * y[:, size:]
    # Each product is rounded twice, their sum once.
    size_of = kept * (re**2 + im**2) * (np.abs(up_re) + np.abs(up_im))
    assert (np.abs(seen - expected) <= 2 * EPS32 * size_of).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("parts", "size"), [((4, 2, 2), 8), ((5,), 3), ((16, 16, 16), 96)])
def test_regroup_heads_there_and_back(rows: int, parts: tuple[int, ...], size: int) -> None:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 2 * sum(parts) * size)).astype(np.float32)
    ends = np.cumsum([2 * heads * size for heads in parts])[:-1]
    expected = np.concatenate(
        [
            part.reshape(rows, 2, -1, size).transpose(0, 2, 1, 3).reshape(rows, -1)
            for part in np.split(x, ends, axis=1)
        ],
        axis=1,
    )
    unit = vector_unit(load_target("cpu"))
    batch = batch_of(rows)
    there = run(build_regroup_heads(parts, size, True, unit, batch), x.shape, x)
    np.testing.assert_array_equal(there, expected)
    back = run(build_regroup_heads(parts, size, False, unit, batch), x.shape, there)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_extreme_values(activation: str) -> None:
    gate = np.array([-np.float32(3e38), -200, -87, 0, 87, 200, 3e38, 1], np.float32)
    gate_up = np.concatenate([gate, np.ones(8, np.float32)])[None]
    unit = vector_unit(load_target("cpu"))
    y = run(build_gate_product(activation, 8, unit, "single"), (1, 8), gate_up)[0]
    assert np.isfinite(y).all()
    assert y[:3] == pytest.approx(0, abs=1e-5)  # x e^x vanishes; and stops at x = -87
    assert y[3] == 0
    np.testing.assert_allclose(y[4:7], gate[4:7], rtol=EPS32)
