"""The widely-linear form: block split, conjugation rule, exact round trips."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairy_compile.errors import FairyError
from fairy_compile.phase import as_float32, from_widely_linear, to_widely_linear

RNG = np.random.default_rng(7)

even_shapes = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda s: (2 * s[0], 2 * s[1]))


def integers(shape: tuple[int, ...]) -> np.ndarray:
    """Integer-valued float32: all sums below are exact."""
    return RNG.integers(-1000, 1000, shape).astype(np.float32)


def test_block_split_of_u_and_w():
    # One weight per block; the four signs below are what ports of these models get wrong.
    a11, a12, a21, a22 = 2.0, 4.0, 8.0, 16.0
    (u_re, u_im), (w_re, w_im) = to_widely_linear(np.array([[a11, a12], [a21, a22]]))
    assert u_re.item() == (a11 + a22) / 2
    assert u_im.item() == (a21 - a12) / 2
    assert w_re.item() == (a11 - a22) / 2
    assert w_im.item() == (a12 + a21) / 2


def test_blocks_are_halves_of_rows_and_columns():
    a = integers((6, 4))
    (u_re, u_im), _ = to_widely_linear(a)
    assert u_re.shape == (3, 2)
    np.testing.assert_array_equal(u_re, (a[:3, :2] + a[3:, 2:]) / 2)
    np.testing.assert_array_equal(u_im, (a[3:, :2] - a[:3, 2:]) / 2)


def test_conjugation_rule_is_u_x_plus_w_conj_x():
    a, x = integers((6, 10)), integers((10,))
    (u_re, u_im), (w_re, w_im) = to_widely_linear(a)
    z = x[:5] + 1j * x[5:].astype(np.complex128)
    y = (u_re + 1j * u_im) @ z + (w_re + 1j * w_im) @ z.conj()
    np.testing.assert_array_equal(np.concatenate([y.real, y.imag]), a.astype(float) @ x)
    swapped = (u_re + 1j * u_im) @ z.conj() + (w_re + 1j * w_im) @ z
    assert not np.allclose(swapped, y)


def test_back_by_the_four_block_formulas():
    u, w = (integers((2, 3)), integers((2, 3))), (integers((2, 3)), integers((2, 3)))
    a = from_widely_linear(u, w)
    np.testing.assert_array_equal(a[:2, :3], u[0] + w[0])
    np.testing.assert_array_equal(a[:2, 3:], w[1] - u[1])
    np.testing.assert_array_equal(a[2:, :3], u[1] + w[1])
    np.testing.assert_array_equal(a[2:, 3:], u[0] - w[0])


@settings(deadline=None)
@given(
    even_shapes.flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.integers(-(2**22), 2**22))
    )
)
def test_round_trip_is_exact_for_integers(a):
    np.testing.assert_array_equal(from_widely_linear(*to_widely_linear(a)), a)


@settings(deadline=None)
@given(
    even_shapes.flatmap(
        lambda shape: hnp.arrays(
            np.float32, shape, elements=st.integers(-255, 255).map(lambda i: i / 4096)
        )
    )
)
def test_round_trip_is_exact_for_bfloat16_weights(a):
    stored = a.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored.astype(np.float32), a)
    np.testing.assert_array_equal(from_widely_linear(*to_widely_linear(stored)), a)


@settings(deadline=None)
@given(even_shapes.flatmap(lambda s: hnp.arrays(np.int32, (4, *s), elements=st.integers(-99, 99))))
def test_round_trip_from_u_and_w_is_exact(parts):
    u, w = (parts[0] / 2, parts[1] / 2), (parts[2] / 2, parts[3] / 2)
    back = to_widely_linear(from_widely_linear(u, w))
    np.testing.assert_array_equal(np.array(back), np.array([u, w]))


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (5, 5), (4,), (2, 2, 2), (0, 4), (4, 0)])
def test_sizes_without_a_complex_form_are_refused(shape):
    with pytest.raises(FairyError, match="even"):
        to_widely_linear(np.zeros(shape))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_float_dtype_becomes_float32(dtype):
    out = as_float32(np.array([[0.5, -2.0]], dtype))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, [[0.5, -2.0]])


def test_torch_tensors_are_accepted():
    torch = pytest.importorskip("torch")
    a = integers((4, 6))
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.tensor(a, dtype=dtype, requires_grad=True)
        rounded = tensor.detach().float().numpy()
        np.testing.assert_array_equal(
            np.array(to_widely_linear(tensor)), np.array(to_widely_linear(rounded))
        )


def test_importing_phase_does_not_import_torch_or_tvm():
    code = (
        "import sys, fairy_compile.phase; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'tvm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "weight",
    [
        None,
        "x",
        {},
        [[1, 2], [3]],
        np.ones((2, 2), np.complex64),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(2, 2, device="meta"),
        torch.eye(2).to_sparse(),
        np.zeros((2, 2), [("a", "f4")]),
    ],
    ids=lambda weight: str(weight)[:30],
)
def test_what_holds_no_real_numbers_is_refused(weight):
    with pytest.raises(FairyError, match=r"the weight is .*allowed: real numbers"):
        as_float32(weight)
