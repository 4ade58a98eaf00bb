"""The x86 kernels of instruction sets that this machine lacks, on emulated instructions."""

from __future__ import annotations

import pytest

from fairy_compile.kernels.x86 import (
    AVX2,
    AVX512_AMX,
    AVX512_VBMI,
    AVX512_VNNI,
    AVX_VNNI,
    X86Codebook,
)
from fairy_compile.targets import host_features
from tests.emulation import amx_tiles
from tests.emulation.x86_intrinsics import emulate, without_hardware
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec, make_x
from tests.kernels.x86_cases import CASES, DECODE_CASES, check, check_alone, check_extremes

HERE = host_features()
pytestmark = pytest.mark.skipif(
    not HERE.issuperset(AVX2.features), reason="the emulated instructions need AVX2"
)
LACKED = [
    X86Codebook(without_hardware(isa))
    for isa in (AVX512_VBMI, AVX512_VNNI, AVX_VNNI)
    if not HERE.issuperset(isa.features)
]
QUICK = (("combined", 2, BOTH, "tensor", "int8"), ("combined", 3, BOTH, "row", "int8"))
QUICK_DECODE = (("joint", 2, BOTH, "tensor", "int8"), ("split", 2, BOTH, "row", "int8"))
AMX = X86Codebook(without_hardware(AVX512_AMX))
needs_tiles = pytest.mark.skipif(
    HERE.issuperset(AVX512_AMX.features) or amx_tiles.compiler() is None,
    reason="this machine has AMX itself, or no C compiler for the emulation of tiles",
)
each_lacked = pytest.mark.parametrize("kernel", LACKED, ids=lambda k: k.isa.name)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulate(monkeypatch)


@each_lacked
@pytest.mark.parametrize(
    ("stages", "terms", "scale", "tables"),
    [
        (1, BOTH, "tensor", "joint"),
        (2, BOTH, "tensor", "joint"),
        (2, BOTH, "row", "split"),
        (3, ONLY_W, "tile64", "split"),
    ],
)
def test_one_row(kernel, stages, terms, scale, tables):
    spec = make_spec(parts=(33, 5), m=130, stages=stages, terms=terms, scale=scale)
    check(kernel, spec, make_parts(spec), make_x(spec), "single", tables=tables)


@each_lacked
def test_few_rows(kernel):
    spec = make_spec(parts=(33,), m=130)
    for batch in (2, 5, 8):
        check(kernel, spec, make_parts(spec), make_x(spec, batch), tables="joint", tokens=2)


@each_lacked
@pytest.mark.parametrize(
    ("mode", "stages", "terms", "scale", "act"),
    [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_many_rows(kernel, mode, stages, terms, scale, act):
    spec = make_spec(parts=(17,), m=130, stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 29):
        check(kernel, spec, make_parts(spec), make_x(spec, batch), panels=mode, tokens=1)


@each_lacked
@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1])
def test_sums_do_not_overflow(kernel, code):
    check_extremes(kernel, code)


@needs_tiles
@pytest.mark.parametrize(
    ("mode", "stages", "terms", "scale", "act"),
    [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES],
)
def test_tiles_of_many_rows(monkeypatch, mode, stages, terms, scale, act):
    amx_tiles.emulate_tiles(monkeypatch)
    spec = make_spec(parts=(17,), m=130, stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 16, 29, 45):
        amx_tiles.tile_products()
        check(AMX, spec, make_parts(spec), make_x(spec, batch), panels=mode, tokens=1)
        assert amx_tiles.tile_products() > 0


@needs_tiles
@pytest.mark.parametrize(
    ("tables", "stages", "terms", "scale", "act"),
    [c if c in QUICK_DECODE else pytest.param(*c, marks=pytest.mark.slow) for c in DECODE_CASES],
)
def test_tiles_of_rows_that_decode(monkeypatch, tables, stages, terms, scale, act):
    amx_tiles.emulate_tiles(monkeypatch)
    spec = make_spec(parts=(17,), m=130, stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 45):
        amx_tiles.tile_products()
        check_alone(AMX, spec, make_parts(spec), make_x(spec, batch), tables=tables)
        assert amx_tiles.tile_products() > 0


@needs_tiles
@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1])
def test_sums_of_tiles_do_not_overflow(monkeypatch, code):
    amx_tiles.emulate_tiles(monkeypatch)
    check_extremes(AMX, code)
