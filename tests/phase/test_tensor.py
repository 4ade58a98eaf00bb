"""`PhaseTensor`: packing, dequantising, sizes, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.phase import PhaseTensor, pack_codes, quantize, tile_shape, unpack_codes

code_arrays = hnp.arrays(
    np.uint8,
    st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 5), st.integers(1, 19)),
    elements=st.integers(0, 3),
)


def ones(stages=1, terms=("U", "W"), n=2, m=3, scale="tensor", dtype=np.float32) -> PhaseTensor:
    rows, columns = tile_shape(scale, n, m)
    shape = (stages, len(terms), 2, -(-n // rows), -(-m // columns))
    codes = np.zeros((stages, len(terms), n, m), np.uint8)
    return PhaseTensor.from_codes(codes, np.ones(shape, dtype), terms=terms, scale=scale)


# ----------------------------------------------------------------------------------------- packing


def test_lowest_bits_hold_the_first_column():
    packed = pack_codes(np.array([[1, 2, 3, 0, 3]], np.uint8))
    np.testing.assert_array_equal(packed, [[0b00_11_10_01, 0b11]])


def test_padding_columns_are_code_0():
    assert pack_codes(np.full((1, 5), 3, np.uint8))[0, 1] == 3


@settings(deadline=None)
@given(code_arrays)
def test_pack_and_unpack_are_exact(codes):
    packed = pack_codes(codes)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] // 4))
    np.testing.assert_array_equal(unpack_codes(packed, codes.shape[-1]), codes)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 6))))
def test_unpack_and_pack_are_exact(packed):
    np.testing.assert_array_equal(pack_codes(unpack_codes(packed, 4 * packed.shape[-1])), packed)


# ------------------------------------------------------------------------------------ dequantising


def test_codes_are_quarter_turns():
    codes = np.array([[[[0, 1, 2, 3]]]], np.uint8)
    scales = np.array([2.0, 3.0], np.float32).reshape(1, 1, 2, 1, 1)
    tensor = PhaseTensor.from_codes(codes, scales, terms=("W",), scale="tensor")
    re, im = tensor.dequantize_terms()["W"]
    np.testing.assert_array_equal(re, [[2, 0, -2, 0]])
    np.testing.assert_array_equal(im, [[0, 3, 0, -3]])


def test_stages_add_up():
    codes = np.array([0, 1, 2], np.uint8).reshape(3, 1, 1, 1)
    scales = np.array([[8, 1], [1, 4], [2, 1]], np.float32).reshape(3, 1, 2, 1, 1)
    tensor = PhaseTensor.from_codes(codes, scales, terms=("W",), scale="tensor")
    re, im = tensor.dequantize_terms()["W"]
    assert (re.item(), im.item()) == (6, 4)


@pytest.mark.parametrize("terms", [("U", "W"), ("W",)])
def test_dequantize_is_the_real_map_of_the_terms(terms):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 4, (2, len(terms), 5, 6)).astype(np.uint8)
    scales = rng.integers(1, 9, (2, len(terms), 2, 5, 1)).astype(np.float32)
    tensor = PhaseTensor.from_codes(codes, scales, terms=terms, scale="row")
    x = rng.integers(-9, 9, 12).astype(np.float32)
    z = x[:6] + 1j * x[6:]
    parts = {k: re + 1j * im for k, (re, im) in tensor.dequantize_terms().items()}
    y = parts["W"] @ z.conj() + (parts["U"] @ z if "U" in parts else 0)
    np.testing.assert_array_equal(tensor.dequantize() @ x, np.concatenate([y.real, y.imag]))


def test_edge_tiles_take_their_own_scales():
    codes = np.zeros((1, 1, 65, 66), np.uint8)
    scales = np.array([[1, 2], [3, 4]], np.float32) * np.ones((1, 1, 2, 1, 1), np.float32)
    tensor = PhaseTensor.from_codes(codes, scales, terms=("W",), scale="tile64")
    re, _ = tensor.dequantize_terms()["W"]
    assert (re[63, 63], re[63, 64], re[64, 63], re[64, 65]) == (1, 2, 3, 4)


def test_float16_scales():
    tensor = quantize(np.random.default_rng(0).standard_normal((8, 8)), 2)
    half = tensor.with_scale_dtype(np.float16)
    assert half.scales.dtype == np.float16
    np.testing.assert_array_equal(half.codes, tensor.codes)
    np.testing.assert_allclose(half.dequantize(), tensor.dequantize(), rtol=0, atol=5e-3)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [
        ({"n": 64, "m": 64}, 1 + 4 * 32 / 64**2 / 4),
        ({"n": 64, "m": 64, "stages": 2}, 2 + 8 * 32 / 64**2 / 4),
        ({"n": 64, "m": 64, "stages": 4, "dtype": np.float16}, 4 + 16 * 16 / 64**2 / 4),
        ({"n": 64, "m": 64, "stages": 2, "scale": "row"}, 2 + 2 * 32 / 64),
        ({"n": 128, "m": 128, "stages": 2, "scale": "tile64"}, 2 + 2 * 32 / 64**2),
        ({"n": 64, "m": 64, "terms": ("W",)}, 1 + 2 * 32 / 64**2 / 2),
        ({"n": 1, "m": 3, "stages": 2}, 2 + 8 * 32 / 12),  # padding is not counted
    ],
)
def test_bits_per_weight(arguments, bits):
    assert ones(**arguments).bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_shape_is_the_real_one():
    assert ones(n=3, m=5).shape == (6, 10)
    assert ones(stages=3).stages == 3


@pytest.mark.parametrize(
    ("scale", "tile"), [("tensor", (10, 20)), ("row", (1, 20)), ("tile64", (64, 64))]
)
def test_tile_shape(scale, tile):
    assert tile_shape(scale, 10, 20) == tile


# --------------------------------------------------------------------------------- what is refused


def build(**changes):
    good = ones(stages=2, n=4, m=6)
    fields = {k: getattr(good, k) for k in ("codes", "scales", "n", "m", "terms", "scale")}
    return PhaseTensor(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.zeros((0, 2, 4, 2), np.uint8)}, "0 stages"),
        ({"codes": np.zeros((5, 2, 4, 2), np.uint8)}, "5 stages"),
        ({"codes": np.zeros((2, 2, 4, 3), np.uint8)}, "expected uint8"),
        ({"codes": np.zeros((2, 2, 4, 2), np.int8)}, "expected uint8"),
        ({"codes": np.uint8(0)}, "stages"),
        ({"scales": np.ones((2, 2, 2, 4, 1), np.float32)}, "expected float32"),
        ({"scales": np.ones((2, 2, 2, 1, 1), np.float64)}, "expected float32"),
        ({"scales": np.zeros((2, 2, 2, 1, 1), np.float32)}, "positive"),
        ({"scales": -np.ones((2, 2, 2, 1, 1), np.float32)}, "positive"),
        ({"scales": np.full((2, 2, 2, 1, 1), np.nan, np.float32)}, "finite"),
        ({"scales": np.full((2, 2, 2, 1, 1), np.inf, np.float32)}, "finite"),
        ({"terms": ("W", "U")}, "terms"),
        ({"n": 5}, "expected uint8"),
        ({"m": 9}, "expected uint8"),
    ],
)
def test_inconsistent_fields_are_refused(changes, message):
    with pytest.raises(ModelFileError, match=message):
        build(**changes)


def test_unknown_granularity_is_refused():
    with pytest.raises(FairyError, match="allowed: tensor, row, tile64"):
        build(scale="tile32")


def test_codes_above_3_are_refused():
    with pytest.raises(ModelFileError, match="go up to 4"):
        PhaseTensor.from_codes(
            np.full((1, 1, 1, 1), 4, np.uint8),
            np.ones((1, 1, 2, 1, 1), np.float32),
            terms=("W",),
            scale="tensor",
        )


def test_equal_by_contents():
    weight = np.arange(48.0).reshape(6, 8)
    one, other = quantize(weight), quantize(weight)
    assert one == other
    assert one != quantize(-weight)
    assert one != quantize(weight, "w1")
    assert one != one.with_scale_dtype(np.float16)
    assert one != "text"


def test_codes_below_0_are_refused():
    codes = np.full((1, 2, 2, 2), -1)
    with pytest.raises(ModelFileError, match="go down to -1"):
        PhaseTensor.from_codes(codes, np.ones((1, 2, 2, 1, 1), np.float32), ("U", "W"), "tensor")
