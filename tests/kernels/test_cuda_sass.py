"""What nvcc makes of the CUDA kernels: the instructions that their speed rests on."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile.compiler.cuda_binary import find_tool
from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_hopper import ARCH, CudaHopper
from fairy_compile.kernels.cuda_source import CUDA_TYPES

pytestmark = pytest.mark.skipif(
    find_tool("nvcc") is None or find_tool("nvdisasm") is None,
    reason="needs nvcc and nvdisasm: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm",
)

# Instructions for a byte of weights that leave decode to memory on an H200: 128 a clock and
# multiprocessor, divided by the bytes that memory delivers in one (benchmarks/cuda_static.py).
BUDGET = 128 / 20.8


@pytest.fixture(scope="module")
def static():
    path = Path(__file__).parents[2] / "benchmarks" / "cuda_static.py"
    spec = importlib.util.spec_from_file_location("cuda_static", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("stages", [2, 1])
def test_decode(static, tmp_path, stages):
    spec = replace(static.specs()[0], stages=stages)
    (launch,) = CudaPlanes().launches(spec, "single", static.LOOPS)
    code = static.compile_kernel(launch, "__half", "sm_90", tmp_path)
    loads = sum(n for op, n in code.loop.items() if op.startswith("LDG.") and ".128" in op)
    assert code.spilled == 0
    assert code.count("IMMA") == 16 * stages  # a block of 32 columns and a plane each
    assert loads == 2 * stages  # 16 bytes a lane are all planes of 16 weights
    assert sum(code.loop.values()) / (16 * loads) <= BUDGET


# Operands of either type take the same instructions, and as many.
OPERANDS = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@OPERANDS
def test_prefill(static, tmp_path, dtype):
    spec = replace(static.specs()[0], dtype=dtype, out_dtype=dtype)
    grids = CudaPlanes().launches(spec, "many", {})
    code = static.compile_kernel(grids[-1], CUDA_TYPES[dtype], "sm_80", tmp_path)
    assert code.spilled == 0
    assert code.count("HMMA") >= 2 * grids[-1].rows  # 4 blocks x 8 for every 8 rows, twice
    assert code.count("LDGSTS") > 0  # x is copied without a detour through registers


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_multiplications_overlap_on_hopper(static, tmp_path, stages, scale):
    """Also in blocks that share columns."""
    spec = replace(static.specs()[0], stages=stages, scale=scale)
    grids = [g for g in CudaHopper().launches(spec, "many", {}) if g.function.startswith("hopper")]
    assert len(grids) > 1
    for launch in {g.splits > 1: g for g in grids}.values():
        code = static.compile_kernel(launch, "__half", ARCH, tmp_path)
        assert (code.spilled, code.warnings) == (0, 0)


@OPERANDS
def test_prefill_on_hopper(static, tmp_path, dtype):
    spec = replace(static.specs()[0], dtype=dtype, out_dtype=dtype)
    launch = CudaHopper().launches(spec, "many", {})[-1]
    code = static.compile_kernel(launch, CUDA_TYPES[dtype], ARCH, tmp_path)
    assert code.spilled == 0
    assert code.warnings == 0  # multiplications overlap with decoding
    assert code.count("HGMMA") == 4 * 4  # blocks of a group, steps
    assert code.count("LDS") == 4 * 16  # weights of a lane, for both stages at once
    assert code.count("PRMT") == 4 * 16 * 2  # their addresses, and what tensor cores take
