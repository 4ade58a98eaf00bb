"""Codes and scales fitted to each other: nearest sums, monotone error, known limits."""

import itertools

import numpy as np
import pytest

from fairy_compile.errors import FairyError
from fairy_compile.phase import PhaseTensor, quantize, quantize_alternating, quantize_complex
from fairy_compile.phase import alternating as module
from fairy_compile.phase.codebook import codebook

PHASES = np.array([1, 1j, -1, -1j])


def gaussian(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    re, im = rng.standard_normal((2, rows, columns)).astype(np.float32)
    return re, im


def nmse(re, im, codes, scales, granularity) -> float:
    tensor = PhaseTensor.from_codes(codes[:, None], scales[:, None], ("W",), granularity)
    got_re, got_im = tensor.dequantize_terms()["W"]
    lost = np.square(re - got_re).sum(dtype=float) + np.square(im - got_im).sum(dtype=float)
    return lost / (np.square(re).sum(dtype=float) + np.square(im).sum(dtype=float))


@pytest.mark.parametrize(("stages", "points"), [(1, 2), (2, 6), (3, 20), (4, 72)])
def test_folded_points_and_signs_give_all_sums_and_no_others(stages, points):
    book = codebook(stages)
    assert book.size == points
    scales = np.random.default_rng(stages).uniform(0.1, 1, (stages, 2, 1))
    re, im = book.points(scales)[:2]
    folded = {
        (a * x, b * y)
        for x, y in np.stack([re.ravel(), im.ravel()], axis=1)
        for a, b in itertools.product((1, -1), repeat=2)
    }
    size = np.array([scales[:, 0, 0], scales[:, 1, 0]])
    sums = {
        complex(sum(PHASES[c] * size[c % 2, t] for t, c in enumerate(codes)))
        for codes in itertools.product(range(4), repeat=stages)
    }
    assert {complex(np.round(z, 9)) for z in sums} == {
        complex(round(x, 9) + 0.0, round(y, 9) + 0.0) for x, y in folded
    }


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_codes_are_the_nearest_of_all_sums(stages, granularity):
    re, im = gaussian(70, 133, stages)  # edge tiles of 6 rows and 5 columns
    codes, scales = quantize_alternating(re, im, stages, granularity)
    tile = {"tensor": (70, 133), "row": (1, 133), "tile64": (64, 64)}[granularity]
    spread = np.repeat(np.repeat(scales, tile[0], axis=2), tile[1], axis=3)[:, :, :70, :133]
    w = re + 1j * im
    best = np.full(w.shape, np.inf)
    for choice in itertools.product(range(4), repeat=stages):
        point = sum(PHASES[c] * spread[t, c % 2] for t, c in enumerate(choice))
        best = np.minimum(best, np.abs(w - point))
    chosen = sum(
        PHASES[codes[t]] * np.where(codes[t] % 2, spread[t, 1], spread[t, 0]) for t in range(stages)
    )
    assert np.abs(np.abs(w - chosen) - best).max() <= 1e-6 * np.abs(w).max()


def test_signs_survive_scales_in_any_order():
    # Where the second stage is the larger one, the folded difference changes sign.
    re, im = gaussian(4, 50)
    scales = np.float32([[[0.3], [0.9]], [[0.8], [0.2]]])[..., None]
    codes = module.choose_codes(re, im, scales)
    assert nmse(re, im, codes, np.broadcast_to(scales, (2, 2, 1, 1)), "tensor") < 0.25
    rows = np.repeat(scales, 4, axis=2)
    rows[:, :, 1] = rows[::-1, :, 1]  # rows whose turns differ
    by_row = module.choose_codes(re, im, rows)
    alone = module.choose_codes(re[1:2], im[1:2], rows[:, :, 1:2])
    np.testing.assert_array_equal(by_row[:, 1:2], alone)
    np.testing.assert_array_equal(by_row[:, 2:], codes[:, 2:])


@pytest.mark.parametrize(
    ("stages", "granularity", "limit"),
    # The rule leaves .131, .059 and .033. Four levels per real weight (Lloyd-Max) leave .1175.
    [(2, "tensor", 0.1178), (2, "row", 0.1175), (3, "tensor", 0.037), (4, "tensor", 0.013)],
)
def test_error_of_gaussian_weights(stages, granularity, limit):
    re, im = gaussian(512, 512)
    assert nmse(re, im, *quantize_alternating(re, im, stages, granularity), granularity) < limit
    if stages == 2 and granularity == "tensor":
        rule = nmse(re, im, *quantize_complex(re, im, stages), "tensor")
        assert rule == pytest.approx(0.131, abs=0.001)


def test_refitting_the_scales_of_the_rule_gets_half_way():
    re, im = gaussian(512, 512)
    codes, scales = quantize_complex(re, im, 2)
    for axis, part in enumerate((re, im)):
        signs = np.where(codes % 2 == axis, 1.0 - (codes & 2), 0).reshape(2, -1)
        fitted = np.linalg.lstsq(signs.T, part.ravel(), rcond=None)[0]
        scales[:, axis, 0, 0] = fitted
    assert 0.124 < nmse(re, im, codes, scales, "tensor") < 0.127


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile64"])
def test_no_iteration_raises_the_error(granularity):
    re, im = gaussian(80, 80)
    errors = [
        nmse(re, im, *quantize_alternating(re, im, 2, granularity, iterations=k), granularity)
        for k in (0, 1, 2, 4, 8, 12)
    ]
    assert all(b <= a + 1e-7 for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0] - 0.005


def test_a_sample_of_a_large_matrix_fits_as_well(monkeypatch):
    re, im = gaussian(700, 600)
    whole = nmse(re, im, *quantize_alternating(re, im, 2), "tensor")
    monkeypatch.setattr(module, "_SAMPLE_WEIGHTS", 1 << 16)
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 1 << 14)
    sampled = nmse(re, im, *quantize_alternating(re, im, 2), "tensor")
    assert sampled == pytest.approx(whole, abs=5e-4)


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile64"])
def test_results_do_not_depend_on_the_blocks(monkeypatch, granularity):
    re, im = gaussian(130, 200)
    codes, scales = quantize_alternating(re, im, 2, granularity)
    monkeypatch.setattr(module, "_BLOCK_WEIGHTS", 1 << 10)
    again, fitted = quantize_alternating(re, im, 2, granularity)
    np.testing.assert_allclose(fitted, scales, rtol=1e-5)
    assert np.mean(again != codes) < 1e-3


def test_one_stage_is_the_published_rule():
    re, im = gaussian(16, 16)
    for got, want in zip(
        quantize_alternating(re, im, 1, "row"), quantize_complex(re, im, 1, "row"), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile64"])
def test_degenerate_matrices_give_finite_positive_scales(granularity):
    zero, ones = np.zeros((3, 70), np.float32), np.ones((3, 70), np.float32)
    for re, im in ((zero, zero), (ones, zero), (zero, -ones), (ones, ones)):
        codes, scales = quantize_alternating(re, im, 2, granularity)
        assert np.isfinite(scales).all()
        assert (scales >= np.float32(1e-6)).all()
        if re.any() or im.any():
            assert nmse(re, im, codes, scales, granularity) < 1e-4


def test_through_the_public_function():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((128, 256)).astype(np.float32)
    errors = {}
    for method in ("phase", "alternating"):
        tensor = quantize(weight, "w2", scale="row", method=method)
        errors[method] = np.square(tensor.dequantize() - weight).sum() / np.square(weight).sum()
    assert errors["alternating"] < 0.119 < 0.125 < errors["phase"]
    with pytest.raises(FairyError, match="allowed: phase, alternating"):
        quantize(weight, method="gptq")
