"""Decoded panels: exact products of the weights they hold, and how near those weights are."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels.codebook_cpu import MAX_COMBINED_ERROR
from fairy_compile.kernels.x86 import AVX2, AVX512_AMX, X86Codebook
from fairy_compile.kernels.x86_layout import X86Layout
from fairy_compile.kernels.x86_panel_layout import (
    BYTE_LIMIT,
    MIN_TOKENS,
    WORD_LIMIT,
    PanelLayout,
    combine_scales,
    combined_error,
    panels,
)
from tests.kernels.cases import make_parts, make_spec, make_x
from tests.kernels.x86_cases import CASES, HERE, as_stored, check, check_extremes

KERNEL = X86Codebook(AVX512_AMX)
KERNEL_AVX2 = X86Codebook(AVX2)
each_isa = pytest.mark.parametrize("kernel", HERE, ids=lambda k: k.isa.name)
each_limit = pytest.mark.parametrize("limit", [63, BYTE_LIMIT, WORD_LIMIT])


@each_isa
@pytest.mark.parametrize(("mode", "stages", "terms", "scale", "act"), CASES)
def test_products_are_exact(kernel, mode, stages, terms, scale, act):
    spec = make_spec(stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 45):
        check(kernel, spec, make_parts(spec), make_x(spec, batch), panels=mode, tokens=1)


@pytest.mark.parametrize(
    ("stages", "terms", "scale", "act"), [c[1:] for c in CASES if c[0] == "combined"]
)
def test_words_are_exact(stages, terms, scale, act):
    spec = make_spec(stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 45):
        x = make_x(spec, batch)
        check(KERNEL_AVX2, spec, make_parts(spec), x, panels="words", tokens=1)


@each_isa
def test_every_number_of_tokens_and_several_blocks_of_columns(kernel):
    spec = make_spec(parts=(17,), m=700)
    for batch in (1, 8, 9, 11, 12, 13, 16, 17, 24, 64, 100):
        x = make_x(spec, batch)
        check(kernel, spec, make_parts(spec), x, panels="joint", columns=256, tokens=1)


@each_isa
@pytest.mark.parametrize("code", [0, 1])
def test_sums_do_not_overflow(kernel, code):
    check_extremes(kernel, code)


@each_isa
def test_rows_do_not_depend_on_the_batch(kernel):
    """Blocks of tokens are filled with zeros, not with each other's."""
    spec = make_spec(parts=(9,), m=140)
    parts, x = make_parts(spec), make_x(spec, MIN_TOKENS + 5)
    x[::2] *= 1e4
    check(kernel, spec, parts, x, tokens=1)


@pytest.mark.parametrize("mode", ["combined", "joint", "split"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_panels_hold_every_code_once(terms, stages, mode):
    codes = [code for panel in panels(terms, stages, mode) for code in panel.codes]
    assert sorted(codes) == [(term, stage) for term in range(terms) for stage in range(stages)]


@each_limit
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_combined_scales_are_bounded(count, limit):
    scales = np.random.default_rng(count).uniform(0.05, 1, (500, count))
    weights, units, errors = combine_scales(scales, limit)
    assert weights.min() >= 0
    assert weights.astype(int).sum(axis=1).max() <= limit
    off = np.linalg.norm(scales - weights * units[:, None].astype(float), axis=1)
    np.testing.assert_allclose(off / np.linalg.norm(scales, axis=1), errors, atol=1e-6)
    assert errors.max() <= count / (2 * limit - count)


def test_combined_scales_in_small_ratios_are_exact():
    weights, units, errors = combine_scales(np.array([[0.5, 0.25, 0.5, 0.25], [0, 0, 0, 0]]))
    np.testing.assert_allclose(weights[0] * units[0], [0.5, 0.25, 0.5, 0.25], rtol=1e-6)
    assert errors.max() < 1e-6
    assert not weights[1].any()
    assert units[1] == 0


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_combined_error_is_that_of_the_matrix(scale):
    (part,) = parts = make_parts(make_spec(parts=(128,), m=192, scale=scale))
    (near,) = as_stored(AVX512_AMX, parts, "combined")
    exact, seen = part.dequantize().astype(float), near.dequantize().astype(float)
    error = np.linalg.norm(seen - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(combined_error(parts), rel=0.1)  # codes are random


def test_words_make_combined_panels_good_enough_for_int16():
    spec = make_spec(parts=(70,), stages=4, act="int16")
    parts = make_parts(spec)
    assert combined_error(parts, WORD_LIMIT) < combined_error(parts) / 50
    assert KERNEL_AVX2.demands(parts, spec) == {"tables": "split", "panels": "words"}
    assert KERNEL.demands(parts, spec) == {"tables": "split", "panels": "split"}


def test_demands_name_the_fastest_accurate_tables():
    spec = make_spec(parts=(70,), stages=4)
    (part,) = make_parts(spec)
    part.scales[:] = np.array([8, 4, 2, 1]).reshape(4, 1, 1, 1, 1) / 256
    assert KERNEL.demands([part], spec) == {}
    part.scales[:, :, 0] *= np.array([1.1, 0.93]).reshape(2, 1, 1)  # pairs keep their ratio
    part.scales[2:] *= 0.87
    assert combined_error([part]) > MAX_COMBINED_ERROR
    assert KERNEL.demands([part], spec) == {"panels": "joint"}
    assert KERNEL.demands([part], make_spec(parts=(70,), stages=4, act="int16")) == {
        "panels": "joint"
    }
    part.scales[1] *= 1.0003
    assert KERNEL.demands([part], make_spec(parts=(70,), stages=4, act="int16")) == {
        "tables": "split",
        "panels": "split",
    }


@pytest.mark.parametrize("dotless", [False, True])
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_layout_adds_weights_of_panels(scale, dotless):
    spec = make_spec(parts=(70, 9), scale=scale)
    parts, layout = make_parts(spec), PanelLayout(16, 127, dotless)
    packed, plain = layout.pack(parts, spec), X86Layout(16, 127, pair_terms=True).pack(parts, spec)
    modes = ["combined", "words"][: 1 + dotless]
    assert layout.name != X86Layout(16, 127).name
    added = [f"{mode}_{what}" for mode in modes for what in ("weights", "scales")]
    if dotless and scale == "tensor":  # two stages of U and W
        added += ["combined_tables", "combined_table_scales"]
    assert list(packed) == list(layout.arrays(spec)) == [*plain, *added]
    for name, want in layout.arrays(spec).items():
        assert (packed[name].shape, packed[name].dtype) == (want.shape, want.dtype), name
    for mode, tolerance in zip(modes, (0.1, 1e-3), strict=False):
        weights, scales = packed[f"{mode}_weights"], packed[f"{mode}_scales"]
        for unit in range(weights.shape[2]):
            near = weights[:, :, unit] * scales[:, :, unit % 2]
            np.testing.assert_allclose(near, packed["scales"][:, :, unit], rtol=tolerance)
    for part, back in zip(parts, layout.unpack(packed, spec), strict=True):
        np.testing.assert_array_equal(back.scales, part.scales)
