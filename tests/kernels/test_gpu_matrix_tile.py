"""The tile GEMM on matrix units, with units that every thread emulates for itself, on lavapipe.

What a subgroup holds together every thread holds alone here, so any device can run it. It shows
that tiles, offsets and strides are right for matrices of 16; Vulkan's own instructions are seen
only by spirv-val (`tests/codegen/test_spirv_matrices.py`) until a GPU runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.tirx.script import builder as T

from fairy_compile.kernels import vulkan
from fairy_compile.kernels.gpu_builder import load_float, local, store
from fairy_compile.kernels.gpu_matrix_tile import SUBGROUP
from fairy_compile.kernels.vulkan import VulkanKernel
from fairy_compile.targets import Limits, Target
from tests.emulation.gpu_cases import gpu_spec, host_target, run_phase_kernel, tolerance
from tests.emulation.vulkan_device import missing_driver

SIDE = 16


class PlainUnits:
    """Implements `MatrixUnits`: every thread multiplies whole matrices."""

    side = SIDE

    def matrices(self, count: int, dtype: str) -> Any:
        return local((count * SIDE * SIDE,), dtype)

    def clear(self, matrices: Any, at: int) -> None:
        with T.serial(0, SIDE * SIDE) as i:
            store(matrices, at * SIDE * SIDE + i, T.float32(0))

    def load_right(self, matrices: Any, at: int, pointer: Any, stride: int) -> None:
        self._load(matrices, at, pointer, lambda i, j: i * stride + j)

    def load_left(self, matrices: Any, at: int, pointer: Any, stride: int) -> None:
        self._load(matrices, at, pointer, lambda i, j: j * stride + i)

    def _load(self, matrices: Any, at: int, pointer: Any, place: Any) -> None:
        tile, offset = pointer
        with T.serial(0, SIDE) as i, T.serial(0, SIDE) as j:
            value = tile.vload([_row(tile, offset + place(i, j)), _column(tile, offset + place(i, j))])
            store(matrices, at * SIDE * SIDE + i * SIDE + j, value)

    def multiply(self, sums: Any, at: int, left: Any, i: int, right: Any, j: int) -> None:
        size = SIDE * SIDE
        with T.serial(0, SIDE) as r, T.serial(0, SIDE) as c, T.serial(0, SIDE) as k:
            product = load_float(left, i * size + r * SIDE + k) * load_float(
                right, j * size + k * SIDE + c
            )
            where = at * size + r * SIDE + c
            store(sums, where, sums[where] + product)

    def store(self, sums: Any, at: int, pointer: Any, stride: int) -> None:
        tile, offset = pointer
        with T.serial(0, SIDE) as i, T.serial(0, SIDE) as j:
            where = offset + i * stride + j
            value = sums[at * SIDE * SIDE + i * SIDE + j]
            store(tile, (_row(tile, where), _column(tile, where)), value)
