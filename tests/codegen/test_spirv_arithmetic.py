"""Arithmetic, comparisons and casts on every type, on lavapipe against llvm."""

import numpy as np
import pytest
from tvm import tirx

from tests.emulation.vulkan_compare import run_both

pytestmark = pytest.mark.usefixtures("vulkan")

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FLOATS = ("float16", "float32", "float64")
LENGTH = 64


def samples(dtype: str, seed: int = 0) -> np.ndarray:
    """Return values of all sizes, extremes first."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        values = rng.integers(limits.min, limits.max, LENGTH, dtype=dtype, endpoint=True)
        small = rng.integers(0, 9, LENGTH, dtype=dtype)
        values = np.where(rng.random(LENGTH) < 0.5, values, small).astype(dtype)
        values[:4] = [limits.min, limits.max, 0, 1]
        return values
    values = rng.standard_normal(LENGTH) * 10.0 ** rng.integers(-2, 3, LENGTH)
    values[:4] = [0.0, -0.0, 1.0, -1.0]
    return values.astype(dtype)


def nonzero(values: np.ndarray) -> np.ndarray:
    """Return divisors: never 0, nor -1, with which the least integer overflows."""
    values = values.copy()
    values[values == 0] = 3
    if np.issubdtype(values.dtype, np.signedinteger):
        values[values == -1] = 7
    return values


def agree(results, rtol=0.0) -> None:
    for expected, seen in results:
        if rtol:
            np.testing.assert_allclose(seen, expected, rtol=rtol, atol=rtol)
        else:
            np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers(dtype, lanes):
    bits = np.dtype(dtype).itemsize * 8

    def body(a, b, divisor):
        shift = tirx.bitwise_and(b, tirx.const(bits - 1, dtype))
        return [
            a + b,
            a - b,
            a * b,
            tirx.truncdiv(a, divisor),
            tirx.truncmod(a, divisor),
            tirx.floordiv(a, divisor),
            tirx.floormod(a, divisor),
            tirx.min(a, b),
            tirx.max(a, b),
            tirx.bitwise_and(a, b),
            tirx.bitwise_or(a, b),
            tirx.bitwise_xor(a, tirx.bitwise_not(b)),
            tirx.shift_left(a, shift),
            tirx.shift_right(a, shift),
            tirx.Select(tirx.any(a < b, a == divisor), a, b),
            tirx.Select(tirx.all(a >= b, a != divisor, tirx.Not(a > divisor)), a, b),
        ]

    agree(run_both(body, [samples(dtype), samples(dtype, 1), nonzero(samples(dtype, 2))], lanes))


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(dtype, lanes):
    def body(a, b, divisor):
        return [
            a + b,
            a - b,
            a * b,
            tirx.min(a, b),
            tirx.max(a, b),
            tirx.Select(a <= b, a, b),
            tirx.Select(a != b, a, -b),
            a / divisor,
        ]

    inputs = [samples(dtype), samples(dtype, 1), nonzero(samples(dtype, 2))]
    # Vulkan lets a division be off by 2.5 units in the last place.
    agree(run_both(body, inputs, lanes), rtol=4 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("source", [*INTEGERS, *FLOATS])
def test_casts(source):
    values = samples(source)
    targets = [t for t in (*INTEGERS, *FLOATS) if t != source]
    if source in FLOATS:  # out of range is undefined; negative to unsigned as well
        values = np.clip(np.abs(values), 0, 100).astype(source)
    if "float16" in targets:  # beyond its range llvm gives infinity or its largest
        limit = 2048
        values = values[(values <= limit)].copy() if source[0] == "u" else values
        values = np.resize(np.clip(values, None, limit).astype(source), LENGTH)
        if source.startswith("int") and np.iinfo(source).min < -limit:
            values = np.maximum(values, np.array(-limit, source))
    agree(run_both(lambda a: [tirx.Cast(t, a) for t in targets], [values]))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "float16"])
def test_narrow_values_that_are_only_chosen_from(dtype):
    """Nothing is computed with them, and yet a choice needs more than memory of their type."""

    def body(a, b, which):
        return [tirx.if_then_else(which > 0, a, b)]

    arrays = [samples(dtype, 1), samples(dtype, 2), samples("int32", 3)]
    agree(run_both(body, arrays))


def test_booleans_in_memory_and_in_registers():
    a, b = samples("int32"), samples("int32", 1)

    def body(x, y):
        less, odd = x < y, tirx.bitwise_and(x, 1) == 1
        return [
            tirx.Cast("bool", x),
            tirx.Cast("int32", less),
            tirx.Cast("float32", odd),
            tirx.all(less, odd),
            tirx.Not(tirx.any(less, odd)),
        ]

    agree(run_both(body, [a, b]))
    flags = samples("int32") > 0
    agree(run_both(lambda f, x: [tirx.Select(f, x, -x), tirx.Not(f)], [flags, a]))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint8"])
def test_bit_counts(dtype):
    def body(a):
        counts = [tirx.popcount(a)]
        if np.dtype(dtype).itemsize >= 4:  # llvm's own clz of narrow types is not lowered
            counts.append(tirx.clz(tirx.bitwise_or(a, tirx.const(1, dtype))))
        return counts

    agree(run_both(body, [samples(dtype)]))


def test_leading_zeros_of_zero_are_all():
    (result,) = run_both(lambda a: tirx.clz(a), [np.zeros(LENGTH, "int32")])
    assert (result[1] == 32).all()


def test_reinterpret():
    agree(
        run_both(
            lambda a: [tirx.reinterpret("uint32", a), tirx.reinterpret("int32", a)],
            [samples("float32")],
        )
    )
    agree(run_both(lambda a: tirx.reinterpret("float64", a), [samples("int64")]))


@pytest.mark.parametrize(
    ("lanes", "dtype"),
    [(3, "float32"), (6, "int8"), (8, "float16"), (16, "int32")]
    + [
        pytest.param(lanes, dtype, marks=pytest.mark.slow)
        for lanes in (3, 6, 8, 16)
        for dtype in ("float32", "float16", "int8", "int32")
    ],
)
def test_vectors_that_are_split(lanes, dtype):
    inputs = [np.resize(samples(dtype, seed), 16 * lanes * 2) for seed in (0, 1)]

    def body(a, b):
        wide = "float32" if dtype.startswith("float") else "int32"
        return [
            a + b,
            tirx.Select(a < b, a, b),
            tirx.Cast(wide, a) * tirx.const(3, wide),
            tirx.if_then_else(tirx.const(True), b, a),
        ]

    agree(run_both(body, inputs, lanes))
