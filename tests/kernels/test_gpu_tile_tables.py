"""Decoding by a table for every tile (`kernels.gpu_tile_tables`) on lavapipe; which calls do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairy_compile.kernels.gpu_decode import DecodeShape
from fairy_compile.kernels.gpu_tile_tables import tiles_shape
from fairy_compile.kernels.metal import METAL_KERNELS
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from tests.emulation.gpu_cases import BOTH, TILED, gpu_spec, host_target, largest_error
from tests.emulation.vulkan_device import missing_driver

(KERNEL,) = VULKAN_KERNELS
slow = pytest.mark.slow
KNOBS = [{}, {"rows": 1, "ahead": True}, {"rows": 8, "group": 128}, {"rows": 4, "ahead": True}]


def error(shape: tuple, dtype: str, batch: int, knobs: dict, folder: Path) -> float:
    """See `largest_error`."""
    reason = missing_driver()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()
    target = host_target("vulkan")
    return largest_error(KERNEL, gpu_spec(shape, dtype), target, batch, folder, knobs)


@pytest.mark.parametrize("batch", [1, 7])
def test_a_call_matches_the_reference(tmp_path: Path, batch: int) -> None:
    assert error(TILED[0], "float16", batch, KNOBS[1], tmp_path) <= 1


@slow
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_every_shape_matches_the_reference(tmp_path: Path, shape: tuple, knobs: dict) -> None:
    for batch in (1, 2):
        assert error(shape, "float32", batch, knobs, tmp_path) <= 1


@pytest.mark.parametrize(
    ("parts", "rows", "teams"),
    [
        ((2048, 512, 512), 2, 32),
        ((5504, 5504), 1, 32),
        ((2048,), 8, 8),  # 64 rows at most
        ((96,), 2, 16),
        ((72, 8), 2, 4),
        ((33,), 1, 1),
        ((33,), 2, None),
    ],
)
def test_groups_lie_in_one_row_of_tiles(
    parts: tuple[int, ...], rows: int, teams: int | None
) -> None:
    shape = DecodeShape(threads=32, teams=4, rows=rows, tokens=1)
    found = tiles_shape(gpu_spec((parts, 128, 2, BOTH, "tile64"), "float16"), shape)
    assert (found and found.teams) == teams
    assert found is None or (found.threads, found.weights) == (4, "tiles")


def test_bits_are_decoded_where_asked_for_or_where_no_table_serves() -> None:
    kernel, target = METAL_KERNELS[0], host_target("metal")

    def text(shape: tuple, **knobs: str) -> str:
        return kernel.build(gpu_spec(shape, "float16"), target, "single", knobs).script()

    assert text(TILED[1]) == text(TILED[1], weights="table")
    assert text(TILED[1]) != text(TILED[1], weights="bits")
    assert text(TILED[-1]) == text(TILED[-1], weights="bits")
