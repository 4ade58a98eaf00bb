"""Mathematical functions, on lavapipe against NumPy in float64."""

import math

import numpy as np
import pytest
from tvm import tirx

from tests.emulation.vulkan_compare import run_vulkan

pytestmark = pytest.mark.usefixtures("vulkan")

LENGTH = 128

# Function, its NumPy twin, and the interval to test on. Tolerances are those of the Vulkan
# specification ("Precision of GLSL.std.450 Instructions") with a margin for lavapipe's polynomials.
UNARY = {
    "exp": (np.exp, -8, 8),
    "exp2": (np.exp2, -8, 8),
    "exp10": (lambda x: 10.0**x, -3, 3),
    "log": (np.log, 0.01, 50),
    "log2": (np.log2, 0.01, 50),
    "log10": (np.log10, 0.01, 50),
    "log1p": (np.log1p, -0.5, 5),
    "sqrt": (np.sqrt, 0, 50),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 0.01, 50),
    "sin": (np.sin, -3, 3),
    "cos": (np.cos, -3, 3),
    "tan": (np.tan, -1, 1),
    "asin": (np.arcsin, -0.9, 0.9),
    "acos": (np.arccos, -0.9, 0.9),
    "atan": (np.arctan, -9, 9),
    "sinh": (np.sinh, -3, 3),
    "cosh": (np.cosh, -3, 3),
    "tanh": (np.tanh, -4, 4),
    "asinh": (np.arcsinh, -5, 5),
    "acosh": (np.arccosh, 1.1, 9),
    "atanh": (np.arctanh, -0.9, 0.9),
    "erf": (np.vectorize(math.erf), -5, 5),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -9, 9),
    "floor": (np.floor, -9, 9),
    "ceil": (np.ceil, -9, 9),
    "trunc": (np.trunc, -9, 9),
    "round": (np.round, -9, 9),
    "nearbyint": (np.round, -9, 9),
    "abs": (np.abs, -9, 9),
}
_LOOSE = {"asin": 2e-3, "acos": 2e-3, "atan": 2e-3}  # 4096 units in the last place are allowed


def fma(x, y, z):
    return tirx.call_intrin(x.ty.dtype, "tirx.fma", x, y, z)


@pytest.mark.parametrize(
    ("lanes", "dtype"),
    [(4, "float16"), (1, "float32")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "float16"), (4, "float32"))],
)
def test_unary(lanes, dtype):
    inputs = [np.linspace(low, high, LENGTH).astype(dtype) for _, low, high in UNARY.values()]

    def body(*values):
        return [getattr(tirx, name)(x) for name, x in zip(UNARY, values, strict=True)]

    results = run_vulkan(body, inputs, lanes)
    for (name, (reference, _, _)), x, seen in zip(UNARY.items(), inputs, results, strict=True):
        tolerance = _LOOSE.get(name, 2e-5) + 6 * float(np.finfo(dtype).eps)
        np.testing.assert_allclose(
            seen, reference(x.astype("float64")), tolerance, tolerance, err_msg=f"{name} {dtype}"
        )


def test_binary():
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.1, 4, LENGTH).astype("float32") for _ in range(2))
    signed = (a - 2).astype("float32")

    def body(x, y, s):
        return [
            tirx.pow(x, y),
            tirx.atan2(s, x),
            tirx.fmod(s, y),
            tirx.hypot(s, y),
            tirx.copysign(x, s),
            fma(x, y, s),
        ]

    seen = run_vulkan(body, [a, b, signed])
    x, y, s = (v.astype("float64") for v in (a, b, signed))
    expected = [x**y, np.arctan2(s, x), np.fmod(s, y), np.hypot(s, y), np.copysign(x, s), x * y + s]
    for result, wanted, rtol in zip(seen, expected, [1e-4, 2e-3, 1e-5, 1e-5, 0, 1e-6], strict=True):
        np.testing.assert_allclose(result, wanted, rtol=rtol, atol=rtol)


def test_float64_has_what_is_exact():
    x = np.linspace(0.5, 9, LENGTH)
    seen = run_vulkan(lambda a: [tirx.sqrt(a), tirx.floor(a), fma(a, a, a)], [x])
    np.testing.assert_allclose(seen[0], np.sqrt(x), rtol=1e-15)
    np.testing.assert_array_equal(seen[1], np.floor(x))
    np.testing.assert_allclose(seen[2], x * x + x, rtol=1e-15)


def test_classification():
    x = np.resize(np.array([0, 1, -1, np.inf, -np.inf, np.nan, 1e38], "float32"), LENGTH)
    nan, inf, finite = run_vulkan(lambda a: [tirx.isnan(a), tirx.isinf(a), tirx.isfinite(a)], [x])
    np.testing.assert_array_equal(nan, np.isnan(x))
    np.testing.assert_array_equal(inf, np.isinf(x))
    np.testing.assert_array_equal(finite, np.isfinite(x))
