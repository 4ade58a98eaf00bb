"""int8 activations a token: the rounding kernel bit for bit, and guarded calls of every kernel."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels.attention_cpu_vector import vector_unit
from fairy_compile.kernels.elementwise_cpu import build_token_rounding
from fairy_compile.op import phase_gemm_reference
from fairy_compile.op.token_int8 import (
    guard_activations,
    guard_weight,
    guarded_columns,
    round_tokens,
)
from fairy_compile.phase import quantize_complex_layer
from fairy_compile.targets import load_target
from tests.kernels.cases import ONLY_W, make_spec
from tests.kernels.test_elementwise_cpu import batch_of, run
from tests.kernels.x86_cases import HERE
from tests.kernels.x86_cases import run as run_kernel

COLUMNS = [1, 7, 88, 126, 127, 300, 1536]
EXACT = {"tables": "split", "panels": "split"}


def activations(rows: int, m: int) -> np.ndarray:
    """Tokens of very different sizes; one of zeros, one with a single value, one of ties."""
    rng = np.random.default_rng([rows, m])
    x = rng.standard_normal((rows, 2 * m)) * 10.0 ** rng.integers(-7, 5, (rows, 1))
    special = [np.zeros(2 * m), np.eye(1, 2 * m, m)[0] * 1e30, np.arange(2 * m) % 255 / 2 - 63.5]
    for i, row in zip(range(1, rows), special, strict=False):
        x[i] = row
    return x.astype(np.float32)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("m", COLUMNS)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_rounding_equals_numpy_bit_for_bit(rows: int, m: int, guarded: bool) -> None:
    x = activations(rows, m)
    want = guard_activations(x) if guarded else round_tokens(x)
    unit = vector_unit(load_target("cpu"))
    seen = run(build_token_rounding(m, guarded, unit, batch_of(rows)), want.shape, x)
    np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("scale", ["tensor", pytest.param("row", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", HERE, ids=lambda k: k.isa.name)
def test_guarded_calls_compute_the_contract(kernel, scale: str) -> None:
    """Against the reference with rounded inputs, which knows nothing of groups or guards."""
    m = 300
    for rows in (1, 2, 17, 64):
        rng = np.random.default_rng([rows, m])
        layers = [
            quantize_complex_layer(*rng.standard_normal((2, n, m)), scale=scale) for n in (70, 9)
        ]
        spec = make_spec((70, 9), guarded_columns(m), 1, ONLY_W, scale)
        x = rng.standard_normal((rows, 2 * m)).astype(np.float32)
        parts = [guard_weight(layer) for layer in layers]
        seen = run_kernel(
            kernel, spec, parts, guard_activations(x), "single" if rows == 1 else "many", **EXACT
        )
        want = phase_gemm_reference(round_tokens(x), layers)
        # Sums of groups are exact; a few of them are added, with scales that were rounded.
        assert np.linalg.norm(seen - want) <= 20 * 2**-24 * np.linalg.norm(want)
