"""The phase rule: sector edges, scales, residual stages against independent oracles."""

import math
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.phase import (
    FAIRY2I_MIN_SCALE,
    IFAIRY_MIN_SCALE,
    from_widely_linear,
    phase_codes,
    quantize,
    quantize_complex,
    quantize_complex_layer,
    to_widely_linear,
)
from fairy_compile.phase.quantize import check_finite

PHASES = np.array([1, 1j, -1, -1j])


def code(re: float, im: float) -> int:
    return int(phase_codes(np.float32([re]), np.float32([im]))[0])


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


# ------------------------------------------------------------------------------------- the sectors


@pytest.mark.parametrize(
    ("re", "im", "want"),
    [
        (1, 1, 1),  # pi/4 belongs to +i
        (1, -1, 0),  # -pi/4 belongs to +1
        (-1, 1, 2),  # 3pi/4 belongs to -1
        (-1, -1, 3),  # -3pi/4 belongs to -i
    ],
)
def test_each_sector_owns_its_lower_edge(re, im, want):
    assert code(re, im) == want


@pytest.mark.parametrize(("re", "im", "want"), [(1, 0, 0), (0, 1, 1), (-1, 0, 2), (0, -1, 3)])
def test_axes(re, im, want):
    assert code(re, im) == want


@pytest.mark.parametrize("edge", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_one_float_beside_an_edge(edge):
    re, im = np.float32(edge[0]), np.float32(edge[1])
    toward_real = np.nextafter(im, np.float32(0))
    toward_imag = np.nextafter(re, np.float32(0))
    assert code(re, toward_real) == (0 if re > 0 else 2)
    assert code(toward_imag, im) == (1 if im > 0 else 3)


@pytest.mark.parametrize("re", [0.0, -0.0])
@pytest.mark.parametrize("im", [0.0, -0.0])
def test_zero_of_either_sign_is_code_0(re, im):
    assert code(re, im) == 0


def test_negative_zero_imaginary_part_on_the_negative_axis():
    assert code(-1.0, -0.0) == code(-1.0, 0.0) == 2


def test_edges_hold_at_the_smallest_and_largest_floats():
    for size in (np.float32(1e-45), np.float32(3e38)):
        assert [code(size, size), code(size, -size)] == [1, 0]
        assert [code(-size, size), code(-size, -size)] == [2, 3]


@settings(deadline=None)
@given(st.integers(-50, 50), st.integers(-50, 50))
def test_sectors_agree_with_the_angle(re, im):
    theta = math.atan2(im, re)
    if -math.pi / 4 <= theta < math.pi / 4:
        want = 0
    elif math.pi / 4 <= theta < 3 * math.pi / 4:
        want = 1
    elif -3 * math.pi / 4 <= theta < -math.pi / 4:
        want = 3
    else:
        want = 2
    assert code(re, im) == want


# -------------------------------------------------------------------------------------- the scales


def test_scales_are_means_over_their_own_codes():
    re = np.float32([[4.0, -2.0, 1.0, 0.5]])
    im = np.float32([[1.0, 1.0, 8.0, -3.0]])
    codes, scales = quantize_complex(re, im, 1)
    np.testing.assert_array_equal(codes, [[[0, 2, 1, 3]]])
    np.testing.assert_array_equal(scales[0, :, 0, 0], [3.0, 5.5])


@pytest.mark.parametrize("min_scale", [FAIRY2I_MIN_SCALE, IFAIRY_MIN_SCALE])
def test_empty_set_has_the_least_scale(min_scale):
    re, im = np.full((2, 2), 3, np.float32), np.zeros((2, 2), np.float32)
    _, scales = quantize_complex(re, im, 1, min_scale=min_scale)
    np.testing.assert_array_equal(scales.ravel(), np.float32([3, min_scale]))
    _, scales = quantize_complex(im, re, 1, min_scale=min_scale)
    np.testing.assert_array_equal(scales.ravel(), np.float32([min_scale, 3]))


def test_least_scales_of_the_two_papers():
    assert (FAIRY2I_MIN_SCALE, IFAIRY_MIN_SCALE) == (1e-6, 1e-5)
    zero = np.zeros((4, 4))
    assert quantize(zero, 1).scales.max() == np.float32(1e-6)
    assert quantize_complex_layer(zero, zero).scales.max() == np.float32(1e-5)


def test_tiny_means_are_clamped_too():
    _, scales = quantize_complex(np.full((1, 2), 1e-9, np.float32), np.zeros((1, 2), np.float32), 1)
    assert scales.min() == np.float32(1e-6)


def test_zero_matrix_is_code_0_in_the_first_stage():
    tensor = quantize(np.zeros((4, 8)), 2)
    assert (tensor.unpack()[0] == 0).all()


# --------------------------------------------------------- residual stages, against two oracles


def oracle_complex(w: np.ndarray, stages: int, tile: tuple[int, int]) -> np.ndarray:
    """The rule with angles and means, tile by tile, in complex128."""
    total = np.zeros_like(w)
    for _ in range(stages):
        rest = w - total
        for i in range(0, w.shape[0], tile[0]):
            for j in range(0, w.shape[1], tile[1]):
                area = np.s_[i : i + tile[0], j : j + tile[1]]
                part = rest[area]
                theta = np.angle(part)
                codes = np.full(part.shape, 2)
                codes[(theta >= -np.pi / 4) & (theta < np.pi / 4)] = 0
                codes[(theta >= np.pi / 4) & (theta < 3 * np.pi / 4)] = 1
                codes[(theta >= -3 * np.pi / 4) & (theta < -np.pi / 4)] = 3
                on_real, on_imag = codes % 2 == 0, codes % 2 == 1
                s_re = np.abs(part.real[on_real]).mean() if on_real.any() else 0.0
                s_im = np.abs(part.imag[on_imag]).mean() if on_imag.any() else 0.0
                scale = np.where(on_real, max(s_re, 1e-6), max(s_im, 1e-6))
                total[area] += PHASES[codes] * scale
    return total


def oracle(weight: np.ndarray, stages: int, granularity: str) -> np.ndarray:
    (u_re, u_im), (w_re, w_im) = to_widely_linear(weight)
    n, m = u_re.shape
    tile = {"tensor": (n, m), "row": (1, m), "tile64": (64, 64)}[granularity]
    parts = [
        oracle_complex(re.astype(np.complex128) + 1j * im, stages, tile)
        for re, im in ((u_re, u_im), (w_re, w_im))
    ]
    return from_widely_linear(*((part.real, part.imag) for part in parts))


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_match_the_angle_oracle(stages, granularity):
    weight = random_weight(2 * 70, 2 * 133, seed=stages)  # edge tiles of 6 rows and 5 columns
    want = oracle(weight, stages, granularity)
    got = quantize(weight, stages, scale=granularity).dequantize()
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_match_torch_angles(stages):
    torch = pytest.importorskip("torch")

    def stage(w):
        theta = torch.angle(w)
        plus_i = (theta >= math.pi / 4) & (theta < 3 * math.pi / 4)
        minus_i = (theta >= -3 * math.pi / 4) & (theta < -math.pi / 4)
        plus_1 = (theta >= -math.pi / 4) & (theta < math.pi / 4)
        on_imag = plus_i | minus_i
        s_re = w.real[~on_imag].abs().mean().clamp(min=1e-6)
        s_im = w.imag[on_imag].abs().mean().clamp(min=1e-6)
        re = torch.where(plus_1, s_re, -s_re) * ~on_imag
        im = torch.where(plus_i, s_im, -s_im) * on_imag
        return torch.complex(re, im)

    weight = random_weight(96, 128, seed=10 + stages)
    a = torch.tensor(weight, dtype=torch.float64)
    (a11, a12), (a21, a22) = (rows.split(64, dim=1) for rows in a.split(48))
    parts = []
    for w in (torch.complex(a11 + a22, a21 - a12) / 2, torch.complex(a11 - a22, a12 + a21) / 2):
        total = torch.zeros_like(w)
        for _ in range(stages):
            total = total + stage(w - total)
        parts.append((total.real.numpy(), total.imag.numpy()))
    want = from_widely_linear(*parts)
    got = quantize(weight, stages).dequantize()
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_every_stage_lowers_the_error():
    weight = random_weight(64, 64)
    errors = [np.square(quantize(weight, t).dequantize() - weight).sum() for t in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    # Gaussian weights, two stages: the published rule leaves about 13 % of the energy.
    assert 0.11 < errors[1] / np.square(weight).sum() < 0.15


def test_the_rule_is_not_idempotent():
    baked = quantize(random_weight(64, 64), 2).dequantize()
    again = quantize(baked, 2).dequantize()
    assert np.abs(again - baked).max() > 0.01 * np.abs(baked).max()


def test_results_do_not_depend_on_the_row_blocks(monkeypatch):
    weight = random_weight(2 * 130, 2 * 70)
    for granularity in ("tensor", "row", "tile64"):
        whole = quantize(weight, 2, scale=granularity)
        module = sys.modules["fairy_compile.phase.quantize"]  # the function hides the module
        monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 100)
        blocks = quantize(weight, 2, scale=granularity)
        monkeypatch.undo()
        np.testing.assert_array_equal(whole.codes, blocks.codes)
        np.testing.assert_allclose(whole.scales, blocks.scales, rtol=1e-6)


def test_edge_tiles_have_the_means_of_what_they_hold():
    # 65 complex rows and columns: the last tile holds a single weight.
    u = np.full((65, 65), 2.0 + 1j)
    u[64, 64] = 7.0 + 1j
    weight = from_widely_linear((u.real, u.imag), (0 * u.real, 0 * u.real))
    tensor = quantize(weight, 1, scale="tile64")
    assert tensor.scales.shape == (1, 2, 2, 2, 2)
    np.testing.assert_array_equal(tensor.scales[0, 0, 0], [[2, 2], [2, 7]])


# --------------------------------------------------------------------------- the public functions


def test_quant_names_numbers_and_configs_agree():
    weight = random_weight(8, 8)
    by_name = quantize(weight, "w3")
    assert by_name.stages == 3
    for quant in (3, QuantConfig("w3"), QuantConfig(stages_for={"lm_*": 3})):
        np.testing.assert_array_equal(by_name.codes, quantize(weight, quant, name="lm_head").codes)


def test_scale_overrides_the_config():
    assert quantize(random_weight(8, 8), QuantConfig(scale="row"), scale="tile64").scale == "tile64"


def test_torch_and_numpy_weights_give_the_same_codes():
    torch = pytest.importorskip("torch")
    weight = random_weight(16, 16)
    want, got = quantize(weight), quantize(torch.tensor(weight))
    np.testing.assert_array_equal(want.codes, got.codes)
    np.testing.assert_array_equal(want.scales, got.scales)


def test_complex_layer_has_one_term():
    rng = np.random.default_rng(0)
    re, im = rng.standard_normal((2, 6, 10)).astype(np.float32)
    tensor = quantize_complex_layer(re, im)
    assert (tensor.terms, tensor.shape) == (("W",), (12, 20))
    want = oracle_complex(re.astype(np.complex128) + 1j * im, 1, (6, 10))
    got_re, got_im = tensor.dequantize_terms()["W"]
    np.testing.assert_allclose(got_re + 1j * got_im, want, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(bad):
    weight = random_weight(8, 8)
    weight[3, 5] = bad
    with pytest.raises(FairyError, match=r"model\.q.*1 non-finite.*\(3, 5\)"):
        quantize(weight, name="model.q")


def test_a_nan_in_bfloat16_is_named_without_a_warning():
    """One that signals, as damaged files have them."""
    weight = np.zeros((2, 2), np.uint16)
    weight[1, 0] = 0x7F81
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FairyError, match=r"1 non-finite.*\(1, 0\)"):
            check_finite(weight.view(ml_dtypes.bfloat16))


def test_infinities_that_cancel_are_found():
    weight = random_weight(8, 8)
    weight[0, 0], weight[1, 1] = np.inf, -np.inf
    with pytest.raises(FairyError, match="2 non-finite"):
        quantize(weight)


def test_bad_arguments():
    with pytest.raises(FairyError, match="even"):
        quantize(np.zeros((3, 4)))
    with pytest.raises(FairyError, match="allowed: w1, w2, w3, w4"):
        quantize(np.zeros((4, 4)), "w5")
    with pytest.raises(FairyError, match="tile64"):
        quantize(np.zeros((4, 4)), scale="column")
    with pytest.raises(FairyError, match="terms"):
        quantize(np.zeros((4, 4)), QuantConfig(terms=("W",)))
    with pytest.raises(FairyError, match="differ in shape"):
        quantize_complex_layer(np.zeros((4, 4)), np.zeros((4, 6)))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), None, "x"])
def test_a_lower_clamp_that_is_none_is_refused(value):
    with pytest.raises(FairyError, match=r"min_scale is .*; allowed: above 0"):
        quantize(np.ones((2, 2)), min_scale=value)


def test_stages_may_be_a_number_of_numpy():
    assert quantize(np.ones((2, 2)), np.int64(3)).stages == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["phase", "alternating"])
def test_weights_of_which_two_sum_to_infinity_are_named(method):
    weight = random_weight(8, 8)
    weight[1, 2] = -1.8e38
    with pytest.raises(
        FairyError, match=r"q_proj holds -1\.8e\+38 at \(1, 2\); allowed: up to 1\.7"
    ):
        quantize(weight, method=method, name="q_proj")
    with pytest.raises(FairyError, match="non-finite"):
        quantize(np.full((2, 2), 1e39))  # beyond float32


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("method", ["phase", "alternating"])
def test_large_weights_are_quantised_like_small_ones(method, scale):
    weight = random_weight(64, 128)
    weight /= np.abs(weight).max()
    small = quantize(weight, "w3", method=method, scale=scale)
    large = quantize(weight * np.float32(2.0**126), "w3", method=method, scale=scale)
    np.testing.assert_array_equal(large.codes, small.codes)
    np.testing.assert_allclose(large.scales, small.scales * 2.0**126, rtol=1e-5)
