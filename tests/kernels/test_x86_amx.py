"""The AMX kernel: exact products of the weights its panels hold, and how near those weights are."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from fairy_compile.kernels import x86_amx
from fairy_compile.kernels.x86 import AVX512_AMX, MAX_COMBINED_ERROR, X86Codebook
from fairy_compile.kernels.x86_amx_layout import (
    PanelLayout,
    combine_scales,
    combined_error,
    panels,
)
from fairy_compile.kernels.x86_layout import X86Layout
from fairy_compile.kernels.x86_tables import joint_ratio
from fairy_compile.op import phase_gemm_reference
from fairy_compile.phase import PhaseTensor
from fairy_compile.targets import Target, host_features
from tests.kernels.test_x86 import (
    BOTH,
    ONLY_W,
    make_parts,
    make_spec,
    make_target,
    make_x,
    run,
    tolerance,
)

KERNEL = X86Codebook(AVX512_AMX)
needs_amx = pytest.mark.skipif(
    not host_features().issuperset(AVX512_AMX.features), reason="this machine has no AMX"
)


def as_stored(parts: list[PhaseTensor], mode: str) -> list[PhaseTensor]:
    """Return the layers with the scales that a table mode rounds theirs to."""
    return [
        PhaseTensor.from_codes(p.unpack(), rounded(p.scales, mode), p.terms, p.scale) for p in parts
    ]


def rounded(scales: np.ndarray, mode: str) -> np.ndarray:
    if mode == "combined":
        vectors = np.moveaxis(scales.reshape(-1, *scales.shape[2:]), 0, -1)
        weights, units, _ = combine_scales(vectors.reshape(-1, vectors.shape[-1]))
        near = (weights * units[:, None]).reshape(vectors.shape)
        return np.moveaxis(near, -1, 0).reshape(scales.shape)
    near = scales.copy()
    if mode == "joint":
        for stage in range(0, len(scales) - 1, 2):
            for at in np.ndindex(scales.shape[1:]):
                s1, s2 = (float(scales[(stage + i, *at)]) for i in (0, 1))
                p, q, _ = joint_ratio(s1, s2, 127)
                unit = (p * s1 + q * s2) / (p * p + q * q)
                near[(stage, *at)], near[(stage + 1, *at)] = p * unit, q * unit
    return near


def check(spec, mode: str, batch: int, **knobs) -> None:
    """Compare with the reference of the rounded weights: nothing but float rounding is left."""
    parts, x = make_parts(spec), make_x(spec, batch)
    got = run(KERNEL, spec, parts, x, tables=mode, tokens=1, **knobs)
    stored = as_stored(parts, mode)
    want = phase_gemm_reference(x, stored, spec.act)
    worst = np.max(np.abs(got - want) - tolerance(KERNEL, spec, stored, x, joint=False))
    assert worst <= 0, f"off by {np.abs(got - want).max():.3g}, {worst:.3g} more than allowed"


@needs_amx
@pytest.mark.parametrize(
    ("mode", "stages", "terms", "scale", "act"),
    [
        ("combined", 1, BOTH, "tensor", "int8"),
        ("combined", 2, BOTH, "tensor", "int8"),
        ("combined", 3, BOTH, "row", "int8"),
        ("combined", 2, BOTH, "tile64", "int8"),
        ("combined", 4, ONLY_W, "tensor", "int8"),
        ("joint", 2, BOTH, "tensor", "int8"),
        ("joint", 3, BOTH, "tensor", "int8"),
        ("split", 2, ONLY_W, "row", "int8"),
        ("split", 1, BOTH, "tile64", "int16"),
        ("joint", 2, ONLY_W, "tensor", "int16"),
    ],
)
def test_products_are_exact(mode, stages, terms, scale, act):
    spec = make_spec(stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 45):  # part of one tile of tokens; two tiles and part of a third
        check(spec, mode, batch)


@needs_amx
def test_every_number_of_tokens_and_several_blocks_of_columns():
    spec = make_spec(parts=(17,), m=700)
    for batch in (1, 8, 9, 16, 17, 32, 33, 64, 100):
        check(spec, "joint", batch, columns=256)


@needs_amx
@pytest.mark.parametrize("code", [0, 1])
def test_sums_do_not_overflow(code):
    spec = make_spec(parts=(16,), m=128, act="int16")
    parts, x = make_parts(spec, code=code), np.full((16, 256), 32639, np.float32)
    x[1::2, 1:] = 32512 - 128
    for value in (x, -x):
        got = run(KERNEL, spec, parts, value, tables="combined", tokens=1)
        stored = as_stored(parts, "combined")
        want = phase_gemm_reference(value, stored, "int16")
        assert (np.abs(got - want) <= tolerance(KERNEL, spec, stored, value, joint=False)).all()


@needs_amx
def test_where_the_system_refuses_tiles_the_other_path_is_taken(monkeypatch):
    monkeypatch.setattr(x86_amx, "_TILE_DATA", 63)  # no feature: the system says no
    spec = make_spec(parts=(33,))
    check(spec, "joint", 20, prefetch=0)  # the knob only keeps it apart from other tests' functions


def test_tiles_are_multiplied():
    """Wherever it is compiled, the library has the instructions."""
    function = KERNEL.build(make_spec(parts=(16,)), make_target(KERNEL), "many", {"tokens": 1})
    library = tvm.compile(function, target=make_target(KERNEL).to_tvm())
    assembly = library.mod.inspect_source("s")
    for instruction in ("ldtilecfg", "tdpbssd", "tilerelease"):
        assert instruction in assembly


def test_it_is_for_linux():
    assert KERNEL.unsupported(make_spec(), make_target(KERNEL)) is None
    windows = {"kind": "llvm", "mtriple": "x86_64-pc-windows-msvc"}
    target = Target("test", "", windows, frozenset(AVX512_AMX.features), ())
    assert "another system" in KERNEL.unsupported(make_spec(), target)


@pytest.mark.parametrize("mode", ["combined", "joint", "split"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_panels_hold_every_code_once(terms, stages, mode):
    codes = [code for panel in panels(terms, stages, mode) for code in panel.codes]
    assert sorted(codes) == [(term, stage) for term in range(terms) for stage in range(stages)]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_combined_scales_are_bounded(count):
    scales = np.random.default_rng(count).uniform(0.05, 1, (500, count))
    weights, units, errors = combine_scales(scales)
    assert weights.min() >= 0
    assert weights.astype(int).sum(axis=1).max() <= 127
    off = np.linalg.norm(scales - weights * units[:, None].astype(float), axis=1)
    np.testing.assert_allclose(off / np.linalg.norm(scales, axis=1), errors, atol=1e-6)
    assert errors.max() <= count / (254 - count)


def test_combined_scales_in_small_ratios_are_exact():
    weights, units, errors = combine_scales(np.array([[0.5, 0.25, 0.5, 0.25], [0, 0, 0, 0]]))
    np.testing.assert_allclose(weights[0] * units[0], [0.5, 0.25, 0.5, 0.25], rtol=1e-6)
    assert errors.max() < 1e-6
    assert not weights[1].any()
    assert units[1] == 0


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_combined_error_is_that_of_the_matrix(scale):
    (part,) = parts = make_parts(make_spec(parts=(128,), m=192, scale=scale))
    (near,) = as_stored(parts, "combined")
    exact, seen = part.dequantize().astype(float), near.dequantize().astype(float)
    error = np.linalg.norm(seen - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(combined_error(parts), rel=0.1)  # codes are random


def test_demands_name_the_fastest_accurate_tables():
    spec = make_spec(parts=(70,), stages=4)
    (part,) = make_parts(spec)
    part.scales[:] = np.array([8, 4, 2, 1]).reshape(4, 1, 1, 1, 1) / 256
    assert KERNEL.demands([part], spec) == {}
    part.scales[:, :, 0] *= np.array([1.1, 0.93]).reshape(2, 1, 1)  # pairs keep their ratio
    part.scales[2:] *= 0.87
    assert combined_error([part]) > MAX_COMBINED_ERROR
    assert KERNEL.demands([part], spec) == {"tables": "joint"}
    assert KERNEL.demands([part], make_spec(parts=(70,), stages=4, act="int16")) == {
        "tables": "joint"
    }
    part.scales[1] *= 1.0003
    assert KERNEL.demands([part], make_spec(parts=(70,), stages=4, act="int16")) == {
        "tables": "split"
    }


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_layout_adds_two_arrays(scale):
    spec = make_spec(parts=(70, 9), scale=scale)
    parts, layout = make_parts(spec), PanelLayout(16, 127)
    packed, plain = layout.pack(parts, spec), X86Layout(16, 127).pack(parts, spec)
    assert layout.name != X86Layout(16, 127).name
    assert list(packed) == list(layout.arrays(spec)) == [*plain, *list(packed)[-2:]]
    for name, want in layout.arrays(spec).items():
        assert (packed[name].shape, packed[name].dtype) == (want.shape, want.dtype), name
    weights, scales = packed["combined_weights"], packed["combined_scales"]
    for unit in range(weights.shape[2]):
        near = weights[:, :, unit] * scales[:, :, unit % 2]
        np.testing.assert_allclose(near, packed["scales"][:, :, unit], rtol=0.1)
    for part, back in zip(parts, layout.unpack(packed, spec), strict=True):
        np.testing.assert_array_equal(back.scales, part.scales)
