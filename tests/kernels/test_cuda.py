"""The CUDA kernel's interface: refusals, knobs, launches. Its numbers: tests/emulation."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import tvm

from fairy_compile.errors import FairyError
from fairy_compile.kernels.base import choose_knobs
from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_block import decode_block
from fairy_compile.targets import load_target
from tests.kernels.cases import BOTH, ONLY_W, make_spec

KERNEL = CudaPlanes()
SPEC = make_spec((70, 9), 200, act="int16")
HALF = replace(SPEC, dtype="float16", out_dtype="float16")


def test_serves_its_target():
    target = load_target("cuda")
    assert KERNEL.unsupported(HALF, target) is None
    assert "runs on cpu" in KERNEL.unsupported(HALF, load_target("cpu"))


def test_refusals_say_why():
    target = load_target("cuda")
    assert "int8 or int16" in KERNEL.unsupported(replace(HALF, act="float"), target)
    old = replace(target, tvm={**target.tvm, "arch": "sm_75"})
    assert "sm_80" in KERNEL.unsupported(HALF, old)
    assert "float64" in KERNEL.unsupported(replace(HALF, dtype="float64"), target)


def test_unknown_knobs_are_refused():
    with pytest.raises(FairyError, match="no knob warps with the value 3"):
        KERNEL.launches(HALF, "single", {"warps": 3})


@pytest.mark.parametrize("act", ["int8", "int16"])
@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("switch", [3, 9, 33])
def test_launches_cover_every_number_of_rows(act, terms, stages, switch):
    spec = make_spec((70, 9), 200, stages, terms, act=act)
    launches = KERNEL.launches(spec, "many", {"switch": switch})
    limits = [launch.most for launch in launches]
    assert limits[-1] is None
    assert limits[:-1] == sorted(limits[:-1])
    decodes = [g for g in launches if g.function.startswith("decode")]
    assert decodes[-1].most == switch - 1
    assert launches[: len(decodes)] == decodes


def test_blocks_share_row_tiles_evenly():
    """Every multiprocessor of an H200 has one block or two, all with the same number of tiles."""
    for tiles, per_block in ((128, 1), (256, 2), (688, 6), (1792, 14), (2376, 9)):
        grid = KERNEL.launches(replace(HALF, parts=(tiles * 16,), m=2048), "single", {})[0]
        assert grid.blocks == -(-tiles // per_block) <= 2 * 132


def test_few_rows_split_columns_over_more_warps():
    few = KERNEL.launches(replace(HALF, parts=(2048,), m=2048), "single", {})[0]
    many = KERNEL.launches(replace(HALF, parts=(38016,), m=2048), "single", {})[0]
    assert few.threads == 16 * 32  # all 16 groups of columns at once
    assert many.threads == 9 * 2 * 32


@pytest.mark.parametrize(
    ("tiles", "stages", "terms", "warps", "asked"),
    [
        (128, 2, BOTH, 16, 2),
        (688, 2, BOTH, 12, 2),
        (1792, 2, BOTH, 14, 2),
        (9 * 132, 2, BOTH, 18, 1),  # nine warps that ask for two groups would be few
        (688, 1, BOTH, 24, 1),
        (1792, 1, BOTH, 28, 1),
        (128, 3, BOTH, 16, 1),
        (128, 4, ONLY_W, 16, 2),
    ],
)
def test_warps_and_what_they_ask_for(tiles, stages, terms, warps, asked):
    spec = replace(HALF, parts=(tiles * 16,), m=2048, stages=stages, terms=terms)
    block = decode_block(KERNEL.layout, spec, choose_knobs(KERNEL, {}), 1)
    assert (block.warps, block.asked) == (warps, asked)
    for knob, value in (("warps", 4), ("asked", 3 - asked)):
        other = decode_block(KERNEL.layout, spec, choose_knobs(KERNEL, {knob: value}), 1)
        assert other.warps <= 4 if knob == "warps" else other.asked == value
    more = decode_block(KERNEL.layout, spec, choose_knobs(KERNEL, {"warps": 28}), 1)
    assert more.asked == 1  # registers take two groups of 16 warps at most


@pytest.mark.parametrize("batch", ["single", "many"])
def test_function_passes_arrays_in_order_and_covers_the_rows(batch):
    function = KERNEL.build(HALF, load_target("cuda"), batch, {})
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
    source = tvm.compile(module, target=target).mod.imports[0].inspect_source("cuda")
    launches = KERNEL.launches(HALF, batch, {})
    bodies = source[source.index('extern "C" __global__') :]
    for launch in launches:
        (last,) = re.findall(
            rf"^  {launch.function}\(x_ptr, codes_ptr, scales_ptr, y_ptr, (\w+)\);", bodies, re.M
        )
        assert (last == "1") == (batch == "single")
        assert f"__launch_bounds__({launch.threads})" in bodies
