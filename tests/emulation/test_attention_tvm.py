"""Attention kernels of GPUs over sizes of heads: on a simulated Metal device, on PoCL, on WebGPU.

Emulation shows that they are right, not that they are fast.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels.attention_tvm import shared_bytes
from fairy_compile.targets import load_target
from tests.emulation.attention_tvm_cases import (
    DECODE,
    PAGED,
    RAGGED,
    Cases,
    attention_functions,
    config_of,
)
from tests.emulation.gpu_cases import host_target

KINDS = ("metal", "opencl", "webgpu")
SIZES = (16, 32, 64, 96, 128, 256)
# The commonest size of published models runs always, on the device that checks most. PoCL has no
# float16.
QUICK = {("metal", 128, "float16")}
CASES = [
    pytest.param(kind, dim, dtype, marks=() if (kind, dim, dtype) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for dim in SIZES
    for dtype in ("float16", "float32")
    if (kind, dtype) != ("opencl", "float16")
]


@pytest.mark.parametrize(("kind", "head_dim", "dtype"), CASES)
def test_attention_equals_numpy(rig_of, tmp_path: Path, kind, head_dim: int, dtype: str) -> None:
    rig = rig_of(kind)
    if kind == "metal":
        rig.order = 7
    rig.optimize = False  # of PoCL, see there
    config = config_of(4, 2, head_dim, dtype)
    cases = Cases(config, host_target(kind), (DECODE, PAGED, RAGGED), tmp_path)
    assert cases.error(DECODE) <= 1
    for causal in (0, 1):
        for name in (PAGED, RAGGED):
            assert cases.error(name, causal) <= 1, (name, causal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [("opencl", 128, "float16"), ("opencl", 256, "float32"), ("android", 128, "float16")],
)
def test_kernels_fit_the_shared_memory_of_a_target(name: str, head_dim: int, dtype: str) -> None:
    target = load_target(name)
    functions = attention_functions(config_of(4, 2, head_dim, dtype), target)
    for kernel in (DECODE, PAGED, RAGGED):
        assert 0 < shared_bytes(functions[kernel]) <= target.limits.shared_bytes


@pytest.mark.slow
def test_smaller_tiles_compute_the_same(rig_of, tmp_path: Path) -> None:
    """Half of Metal's memory is what target android has."""
    rig_of("metal").order = 1
    target = host_target("metal")
    target = replace(target, limits=replace(target.limits, shared_bytes=16384))
    cases = Cases(config_of(4, 2, 128, "float16"), target, (PAGED, RAGGED), tmp_path)
    for name in (PAGED, RAGGED):
        assert cases.error(name, causal=1) <= 1


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "target", "own"),
    [
        (9, 128, "float16", "opencl", {"decode"}),
        (4, 36, "float16", "opencl", {"decode", "prefill_paged", "prefill_ragged"}),
        (4, 256, "float32", "android", {"prefill_paged", "prefill_ragged"}),
    ],
)
def test_what_tvm_does_not_serve_our_kernels_do(
    heads: int, head_dim: int, dtype: str, target: str, own: set[str]
) -> None:
    """Threads that leave out heads or elements, and tiles that no memory holds."""
    functions = attention_functions(config_of(heads, 1, head_dim, dtype), load_target(target))
    ours = [name for name in functions if name.startswith("attention_")]
    assert {name.removeprefix("attention_") for name in ours} == own


def test_heads_that_no_kernel_takes_are_refused() -> None:
    words = r"heads have 300 elements; kernels of target opencl take .* up to 256.*--target cpu"
    with pytest.raises(UnsupportedError, match=words):
        attention_functions(config_of(4, 1, 300, "float16"), load_target("opencl"))
