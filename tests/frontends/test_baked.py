"""Recovering codes and scales from weights that already hold phase values."""

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.frontends.baked import recover_baked
from fairy_compile.phase import PhaseTensor, quantize


def random_weight(rows=64, columns=400, seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


def assert_recovered(tensor: PhaseTensor, dtype: object = np.float32, tolerance: float = 1e-6):
    got = recover_baked(tensor.dequantize().astype(dtype), tensor.stages, tensor.scale)
    assert got is not None
    assert (got.terms, got.scale) == (("U", "W"), tensor.scale)
    np.testing.assert_array_equal(got.codes, tensor.codes)
    np.testing.assert_allclose(got.scales, tensor.scales, rtol=tolerance)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_float32_comes_back_exactly(stages, scale):
    assert_recovered(quantize(random_weight(), stages, scale=scale))


def test_edge_tiles_come_back():
    assert_recovered(quantize(random_weight(2 * 66, 2 * 130), 1, scale="tile64"))


def test_three_stages_come_back():
    assert_recovered(quantize(random_weight(320, 320), 3))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 1e-3), (ml_dtypes.bfloat16, 8e-3)])
def test_narrow_dtypes_come_back_to_their_rounding(stages, dtype, tolerance):
    assert_recovered(quantize(random_weight(), stages), dtype, tolerance)


def test_the_plain_rule_would_move_a_baked_weight():
    baked = quantize(random_weight(), 2).dequantize()
    recovered = recover_baked(baked, 2).dequantize()
    assert np.abs(recovered - baked).max() <= 1e-6 * np.abs(baked).max()
    assert np.abs(quantize(baked, 2).dequantize() - baked).max() > 0.01 * np.abs(baked).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_ordinary_weights_are_not_taken_for_baked(stages, scale, dtype):
    assert recover_baked(random_weight(256, 256).astype(dtype), stages, scale) is None


def test_one_changed_weight_ends_the_attempt():
    baked = quantize(random_weight(), 2).dequantize()
    baked[-1, -1] += 1e-4
    assert recover_baked(baked, 2) is None


def test_other_numbers_of_stages_do_not_fit():
    baked = quantize(random_weight(), 2).dequantize()
    assert recover_baked(baked, 1) is None
    assert recover_baked(quantize(random_weight(), 1).dequantize(), 2) is None


@pytest.mark.parametrize("weight", [np.zeros((64, 64)), np.ones((64, 64)), np.eye(64)])
@pytest.mark.parametrize("stages", [1, 2])
def test_degenerate_weights_are_not_taken_for_baked_unless_they_fit(weight, stages):
    weight = weight.astype(np.float32)
    got = recover_baked(weight, stages)
    assert got is None or np.abs(got.dequantize() - weight).max() < 1e-5


def test_few_entries_prove_nothing():
    # 3x5 complex entries are below 4^2; 4x4 are enough.
    assert recover_baked(quantize(random_weight(6, 10), 1).dequantize(), 1) is None
    assert recover_baked(quantize(random_weight(8, 8), 1).dequantize(), 1) is not None
