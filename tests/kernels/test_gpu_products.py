"""Decoding by look-ups of products (`kernels.gpu_products`) on lavapipe, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile.kernels.gpu_decode import DecodeShape
from fairy_compile.kernels.gpu_products import supports
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.targets import Limits
from tests.emulation.gpu_cases import gpu_spec, host_target, largest_error
from tests.emulation.vulkan_device import missing_driver

(KERNEL,) = VULKAN_KERNELS
slow = pytest.mark.slow
BOTH, ONLY_W = ("U", "W"), ("W",)
# Rows that fill no thread group, columns that fill no unit and no turn of all teams, every T.
SHAPES = [
    ((128, 64), 160, 2, BOTH, "tensor"),
    ((150,), 77, 2, BOTH, "tensor"),
    ((70,), 33, 1, BOTH, "tensor"),
    ((64,), 100, 3, BOTH, "tensor"),
    ((33,), 48, 4, ONLY_W, "tensor"),
    ((10,), 5, 2, ONLY_W, "tensor"),
    ((96, 32, 32), 64, 1, ONLY_W, "tensor"),
]
KNOBS = [
    {"threads": 32, "rows": 1},
    {"threads": 16, "rows": 2, "group": 128},
    {"threads": 64, "rows": 1, "group": 256},
    {"threads": 128, "rows": 2, "group": 128},
]


def error(shape: tuple, dtype: str, knobs: dict, folder: Path) -> float:
    """See `largest_error`."""
    reason = missing_driver()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()
    target = replace(host_target("vulkan-nvidia"), limits=Limits(1024, 49152, simd_width=8))
    knobs = {"weights": "products", **knobs}
    return largest_error(KERNEL, gpu_spec(shape, dtype), target, 1, folder, knobs)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_one_row_matches_the_reference(tmp_path: Path, dtype: str) -> None:
    assert error(SHAPES[0], dtype, KNOBS[0], tmp_path) <= 1


@slow
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_shape_matches_the_reference(
    tmp_path: Path, dtype: str, shape: tuple, knobs: dict
) -> None:
    assert error(shape, dtype, knobs, tmp_path) <= 1


def test_which_calls_are_served() -> None:
    shape = DecodeShape(threads=32, teams=8, rows=2, tokens=1)
    assert supports(gpu_spec(((128, 64), 64, 2, BOTH, "tensor"), "float16"), shape)
    assert supports(gpu_spec(((100,), 7, 3, ONLY_W, "tensor"), "float32"), shape)
    mixed = gpu_spec(((96, 64), 64, 2, BOTH, "tensor"), "float16")
    assert not supports(mixed, shape), "a group would have two scales"
    assert supports(mixed, replace(shape, rows=1))
    assert not supports(gpu_spec(((128,), 64, 2, BOTH, "row"), "float16"), shape)


@pytest.mark.parametrize(
    ("shape", "knobs", "floats"),
    [
        (SHAPES[0], {"threads": 32, "rows": 1, "group": 256}, 8 * 32 * 32),
        # Rows of two parts in a group, and more tables than there is shared memory for.
        (((96, 64), 64, 2, BOTH, "tensor"), {"threads": 32, "rows": 2}, None),
        (((64,), 64, 4, BOTH, "tensor"), {"threads": 16, "rows": 1, "group": 512}, None),
        (((64,), 64, 2, BOTH, "row"), {"threads": 32, "rows": 1}, None),
    ],
    ids=["served", "parts", "memory", "rows"],
)
def test_calls_that_are_not_served_look_weights_up(shape, knobs, floats) -> None:
    target, spec = host_target("vulkan-nvidia"), gpu_spec(shape, "float16")
    chosen = {"weights": "products", **knobs}
    text = KERNEL.build(spec, target, "single", chosen).script()
    if floats is None:
        assert text == KERNEL.build(spec, target, "single", chosen | {"weights": "table"}).script()
    else:
        assert f'({floats},), scope="shared"' in text.replace('"float32", ', "")
