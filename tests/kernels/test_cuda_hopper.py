"""The kernel for Hopper: whom it serves, its launches. Its numbers: tests/emulation."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_hopper import CudaHopper
from fairy_compile.targets import load_target
from tests.kernels.cases import BOTH, ONLY_W, make_spec

KERNEL = CudaHopper()
SPEC = replace(make_spec((70, 9), 200, act="int16"), dtype="float16", out_dtype="float16")
_SHARED_BYTES = 227 * 1024  # of a block, CUDA programming guide, compute capability 9.0


def test_serves_machine_code_for_hopper_alone():
    assert KERNEL.unsupported(SPEC, load_target("cuda-hopper")) is None
    refused = KERNEL.unsupported(SPEC, load_target("cuda"))
    assert "for sm_90a alone" in refused
    assert "sm_80, sm_86" in refused
    assert "runs on cpu" in KERNEL.unsupported(SPEC, load_target("cpu"))


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [128, 256])
@pytest.mark.parametrize("parts", [(70, 9), (64, 9)], ids=["odd", "even"])
def test_blocks_fit_shared_memory(stages, terms, scale, tokens, parts):
    spec = make_spec(parts, 200, stages, terms, scale, act="int16")
    launch = KERNEL.launches(spec, "many", {"wide_tokens": tokens, "wide_buffers": 6})[-1]
    assert launch.shared <= _SHARED_BYTES
    assert launch.rows == tokens
    buffers = int(re.search(r"kBuffers = (\d+);", launch.source)[1])
    assert buffers >= (4 if tokens == 256 else 6)
    assert tokens % launch.arrange.threads == 0


def test_launches_cover_every_number_of_rows():
    launches = KERNEL.launches(SPEC, "many", {"wide": 65})
    limits = [launch.most for launch in launches]
    assert limits[-2:] == [64, None]
    assert limits[:-1] == sorted(limits[:-1])


def test_decode_is_that_of_other_gpus():
    assert KERNEL.launches(SPEC, "single", {}) == CudaPlanes().launches(SPEC, "single", {})
