"""Decoding with products in float16 (`kernels.gpu_halves`) on lavapipe, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile.kernels.gpu_halves import supports, supports_blocks
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.targets import Limits
from tests.emulation.gpu_cases import gpu_spec, host_target, largest_error
from tests.emulation.vulkan_device import missing_driver

(KERNEL,) = VULKAN_KERNELS
slow = pytest.mark.slow
BOTH, ONLY_W = ("U", "W"), ("W",)
SHAPES = [
    ((64, 32), 64, 2, BOTH, "tensor"),
    ((33,), 64, 1, BOTH, "row"),
    ((17,), 48, 3, BOTH, "tensor"),
    ((40,), 32, 4, BOTH, "row"),
    ((48,), 96, 1, ONLY_W, "tensor"),
    ((10,), 64, 2, ONLY_W, "tensor"),
    ((70, 9), 256, 2, BOTH, "tensor"),  # parts that share a thread group
    ((50,), 80, 1, BOTH, "tensor"),
]
KNOBS = [
    {"weights": "blocks", "ahead": True},
    {"weights": "halves", "rows": 4, "group": 256},
    {"weights": "blocks", "copies": 1, "rows": 4},
    {"weights": "halves", "ahead": True, "threads": 128},
]


def error(shape: tuple, batch: int, knobs: dict, folder: Path) -> float:
    """See `largest_error`."""
    reason = missing_driver()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()
    target = replace(host_target("vulkan-nvidia"), limits=Limits(1024, 49152, simd_width=8))
    return largest_error(KERNEL, gpu_spec(shape, "float16"), target, batch, folder, knobs)


@pytest.mark.parametrize("knobs", KNOBS[:2])
def test_few_rows_match_the_reference(tmp_path: Path, knobs: dict) -> None:
    assert error(SHAPES[0], 1, knobs, tmp_path) <= 1


@slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_the_reference(
    tmp_path: Path, shape: tuple, knobs: dict, batch: int
) -> None:
    assert error(shape, batch, knobs, tmp_path) <= 1


def test_which_calls_are_served() -> None:
    assert supports_blocks(gpu_spec(SHAPES[0], "float16"), 32)
    assert not supports_blocks(gpu_spec(SHAPES[0], "float16"), 64), "a group would have two scales"
    assert not supports_blocks(gpu_spec(SHAPES[2], "float16"), 1), "T = 3 has too many blocks"
    assert supports(gpu_spec(SHAPES[2], "float16"))
    assert not supports(gpu_spec(SHAPES[0], "float32"))
    assert not supports(gpu_spec(((5,), 7, 3, ONLY_W, "row"), "float16")), "7 is no whole unit"
    assert not supports(gpu_spec(((64,), 128, 2, BOTH, "tile64"), "float16"))


@pytest.mark.parametrize(("weights", "look_up"), [("blocks", 16 * 256 * 4), ("halves", 512)])
def test_calls_that_are_served_look_up_in_float16(weights: str, look_up: int) -> None:
    target, spec = host_target("vulkan-nvidia"), gpu_spec(SHAPES[0], "float16")
    text = KERNEL.build(spec, target, "single", {"weights": weights}).script()
    assert f'({look_up},), "float16", scope="shared"' in text
