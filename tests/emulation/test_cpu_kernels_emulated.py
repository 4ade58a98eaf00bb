"""Attention, norm and activation kernels against NumPy, on the ARM CPUs that QEMU emulates."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels import attention_cpu
from fairy_compile.kernels.attention_cpu import AttentionShape, vector_unit
from fairy_compile.kernels.elementwise_cpu import build_gate_product, build_rms_norm
from tests.emulation import arm_rig
from tests.kernels.attention_cpu_cases import (
    Paged,
    attention,
    check_prefill,
    random,
    tail,
    tolerance,
)
from tests.kernels.test_elementwise_cpu import EPS32

missing = arm_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
# Plain NEON converts float16 too, and cores with dot product are what most targets ask for.
each_machine = pytest.mark.parametrize("machine", arm_rig.MACHINES[:2], ids=lambda m: m.isa)
SHAPES = {
    "gqa2-64-float16": AttentionShape(4, 2, 64, "float16"),
    "gqa4-80-float32": AttentionShape(4, 1, 80, "float32"),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
LENGTHS = (1, 15, 33, 130)


def call(folder, machine, function, *arguments) -> list[np.ndarray]:
    if "global_symbol" not in (function.attrs or {}):
        function = function.with_attr("global_symbol", "kernel")
    program = arm_rig.compile_kernel(function, machine.target(), folder)
    return arm_rig.call(program, machine.cpu, arguments)


@each_machine
@pytest.mark.parametrize(("rows", "size"), [(1, 344), (17, 48), (2, 7)])
def test_rms_norm(tmp_path, machine, rows, size):
    rng = np.random.default_rng([rows, size])
    x = rng.standard_normal((rows, size)).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    batch = "single" if rows == 1 else "many"
    function = build_rms_norm(size, 1e-5, vector_unit(machine.target()), batch)
    y = call(tmp_path, machine, function, x, weight, np.full_like(x, np.nan))[-1]
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    # As in tests/kernels/test_elementwise_cpu.py.
    assert (np.abs(y - want) <= (size / 2 + 4) * EPS32 * np.abs(want)).all()


@each_machine
@pytest.mark.parametrize(("rows", "size"), [(1, 11008), (17, 48), (2, 7)])
def test_silu_product(tmp_path, machine, rows, size):
    rng = np.random.default_rng([rows, size, 1])
    gate_up = (rng.standard_normal((rows, 2 * size)) * 8).astype(np.float32)
    batch = "single" if rows == 1 else "many"
    function = build_gate_product("silu", size, vector_unit(machine.target()), batch)
    y = call(tmp_path, machine, function, gate_up, np.full((rows, size), np.nan, np.float32))[-1]
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    bound = (2e-7 + (np.abs(gate) + 5) * EPS32) * np.abs(want)
    assert (np.abs(y - want) <= bound).all()


@each_machine
@each_shape
def test_decode_attention(tmp_path, machine, shape):
    paged = Paged(shape, LENGTHS)
    q = random(shape, len(LENGTHS), shape.heads, shape.head_dim)
    zero, lse = np.zeros(len(q), np.int32), np.zeros(q.shape[:2], np.float32)
    function = attention_cpu.build_decode(shape, vector_unit(machine.target()))
    arrays = (q, paged.pages, paged.indptr, paged.values, paged.last, zero, zero)
    left = call(tmp_path, machine, function, *arrays, np.zeros_like(q), lse, *tail(shape))
    for s, length in enumerate(LENGTHS):
        want, want_lse = attention(q[s], paged.k[s], paged.v[s], length)
        np.testing.assert_allclose(left[7][s], want, rtol=0, atol=tolerance(shape))
        np.testing.assert_allclose(left[8][s], want_lse, rtol=0, atol=1e-5)


@each_machine
@each_shape
def test_paged_prefill_attention(tmp_path, machine, shape):
    paged = Paged(shape, LENGTHS)
    counts = [min(n, 35) for n in LENGTHS]
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    q = random(shape, sum(counts), shape.heads, shape.head_dim)
    zero, positions = np.zeros(len(counts), np.int32), np.zeros(len(q), np.int32)
    function = attention_cpu.build_paged_prefill(shape, vector_unit(machine.target()))
    left = call(
        *(tmp_path, machine, function, q, indptr, paged.pages, paged.indptr, paged.values),
        *(paged.last, zero, positions, np.zeros_like(q), np.zeros(q.shape[:2], np.float32)),
        *(1, *tail(shape)),
    )
    check_prefill(shape, q, indptr, paged.k, paged.v, 1, left[8], left[9])
