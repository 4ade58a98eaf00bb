"""The tile GEMM on matrix units of 16x16, with units that every thread emulates for itself.

What a subgroup holds together every thread holds alone here, so that any Vulkan device runs it: it
shows that tiles and places are right. Vulkan's own instructions, which lavapipe lacks, go through
spirv-val in `tests/codegen/test_spirv_matrices.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tvm.tirx.script import builder as T

from fairy_compile.kernels import vulkan
from fairy_compile.kernels.gpu_builder import load_float, local, store
from fairy_compile.kernels.gpu_matrix_tile import Place
from fairy_compile.kernels.vulkan_tile import SIDE
from tests.emulation.gpu_cases import gpu_spec, host_target, largest_error
from tests.emulation.vulkan_device import missing_driver

BOTH = ("U", "W")


class PlainUnits:
    """Implements `MatrixUnits`."""

    side = SIDE

    def matrices(self, count: int, dtype: str) -> Any:
        return local((count * SIDE * SIDE,), dtype)

    def clear(self, matrices: Any, at: int) -> None:
        with T.serial(0, SIDE * SIDE) as i:
            store(matrices, at * SIDE * SIDE + i, T.float32(0))

    def load_right(self, matrices: Any, at: int, tile: Any, place: Place) -> None:
        self._load(matrices, at, lambda i, j: tile[place[0] + i, place[1] + j])

    def load_left(self, matrices: Any, at: int, tile: Any, place: Place) -> None:
        self._load(matrices, at, lambda i, j: tile[place[0] + j, place[1] + i])

    @staticmethod
    def _load(matrices: Any, at: int, element: Callable[[Any, Any], Any]) -> None:
        with T.serial(0, SIDE) as i, T.serial(0, SIDE) as j:
            store(matrices, (at * SIDE + i) * SIDE + j, element(i, j))

    def multiply(self, sums: Any, at: int, left: Any, i: int, right: Any, j: int) -> None:
        with T.serial(0, SIDE) as r, T.serial(0, SIDE) as c, T.serial(0, SIDE) as k:
            a = load_float(left, (i * SIDE + r) * SIDE + k)
            b = load_float(right, (j * SIDE + k) * SIDE + c)
            place = (at * SIDE + r) * SIDE + c
            store(sums, place, sums[place] + a * b)

    def store(self, sums: Any, at: int, tile: Any, place: Place) -> None:
        with T.serial(0, SIDE) as i, T.serial(0, SIDE) as j:
            value = sums[(at * SIDE + i) * SIDE + j]
            store(tile, (place[0] + i, place[1] + j), value)


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        (((40,), 48, 2, BOTH, "tensor"), 17),
        pytest.param(((70, 9), 64, 1, BOTH, "row"), 65, marks=pytest.mark.slow),
        pytest.param(((66,), 128, 2, ("W",), "tile64"), 40, marks=pytest.mark.slow),
    ],
)
def test_tiles_match_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple, batch: int
) -> None:
    reason = missing_driver()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()
    monkeypatch.setattr(vulkan, "CooperativeUnits", PlainUnits)
    kernel, spec = vulkan.VulkanKernel(), gpu_spec(shape, "float16")
    target, knobs = host_target("vulkan-nvidia"), {"matrices": True, "switch": 0}
    assert largest_error(kernel, spec, target, batch, tmp_path, knobs) <= 1
