"""The AMX kernel: exact products of the weights its panels hold."""

from __future__ import annotations

import pytest
import tvm

from fairy_compile.kernels import x86_amx_tiles
from fairy_compile.kernels.x86 import AVX512_AMX, X86Codebook
from fairy_compile.targets import Target, host_features
from tests.kernels.cases import make_parts, make_spec, make_x
from tests.kernels.x86_cases import CASES, DECODE_CASES, check_alone, check_extremes, make_target
from tests.kernels.x86_cases import check as check_case

KERNEL = X86Codebook(AVX512_AMX)
needs_amx = pytest.mark.skipif(
    not host_features().issuperset(AVX512_AMX.features), reason="this machine has no AMX"
)


def check(spec, mode: str, batch: int, **knobs) -> None:
    parts, x = make_parts(spec), make_x(spec, batch)
    check_case(KERNEL, spec, parts, x, panels=mode, tokens=1, **knobs)


@needs_amx
@pytest.mark.parametrize(
    ("mode", "stages", "terms", "scale", "act"),
    CASES,
)
def test_products_are_exact(mode, stages, terms, scale, act):
    spec = make_spec(stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 45):  # part of one tile of tokens; two tiles and part of a third
        check(spec, mode, batch)


@needs_amx
@pytest.mark.parametrize(("tables", "stages", "terms", "scale", "act"), DECODE_CASES)
def test_decode_computes_every_row_as_if_alone(tables, stages, terms, scale, act):
    spec = make_spec(stages=stages, terms=terms, scale=scale, act=act)
    for batch in (9, 45):
        check_alone(KERNEL, spec, make_parts(spec), make_x(spec, batch), tables=tables)


@needs_amx
def test_every_number_of_tokens_and_several_blocks_of_columns():
    spec = make_spec(parts=(17,), m=700)
    for batch in (1, 8, 9, 16, 17, 32, 33, 64, 100):
        check(spec, "joint", batch, columns=256)


@needs_amx
@pytest.mark.parametrize("code", [0, 1])
def test_sums_do_not_overflow(code):
    check_extremes(KERNEL, code)


@needs_amx
def test_where_the_system_refuses_tiles_the_other_path_is_taken(monkeypatch):
    monkeypatch.setattr(x86_amx_tiles, "_TILE_DATA", 63)  # no feature: the system says no
    spec = make_spec(parts=(33,))
    knobs = {"prefetch": 0}  # only keeps them apart from other tests' functions
    check(spec, "joint", 20, **knobs)
    check_alone(KERNEL, spec, make_parts(spec), make_x(spec, 20), **knobs)


def test_tiles_are_multiplied():
    """Wherever it is compiled, the library has the instructions."""
    for batch in ("many", "decode"):
        function = KERNEL.build(make_spec(parts=(16,)), make_target(KERNEL), batch, {"tokens": 1})
        library = tvm.compile(function, target=make_target(KERNEL).to_tvm())
        assembly = library.mod.inspect_source("s")
        for instruction in ("ldtilecfg", "tdpbssd", "tilerelease"):
            assert instruction in assembly


def test_it_is_for_linux():
    assert KERNEL.unsupported(make_spec(), make_target(KERNEL)) is None
    windows = {"kind": "llvm", "mtriple": "x86_64-pc-windows-msvc"}
    target = Target("test", "", windows, frozenset(AVX512_AMX.features), ())
    assert "another system" in KERNEL.unsupported(make_spec(), target)
