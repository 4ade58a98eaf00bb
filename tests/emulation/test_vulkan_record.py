"""Dispatches on file: what is recorded can be repeated, and a difference is told."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tvm.script import tirx as T

from tests.emulation.spirv_val import missing_validator
from tests.emulation.vulkan_device import device, missing_driver
from tests.emulation.vulkan_module import bound_buffers
from tests.emulation.vulkan_record import Recorder, distance, repeat
from tests.emulation.vulkan_target import build


@T.prim_func(s_tir=True)
def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
    T.func_attr({"global_symbol": "main"})
    for j in T.thread_binding(64, "threadIdx.x"):
        y[j] = x[j] * T.float32(2)


def test_a_dispatch_is_repeated_and_compared(tmp_path: Path) -> None:
    reason = missing_driver() or missing_validator()
    if reason:
        pytest.skip(reason)
    (kernel,) = build(double)[1].values()
    names = {name.removesuffix("_ptr"): i for i, (name, _) in bound_buffers(kernel.code).items()}
    arrays = [np.zeros(64, "float32") for _ in names]
    arrays[names["x"]][:] = np.arange(64)
    before = [array.tobytes() for array in arrays]
    device().run(kernel, arrays, (1, 1, 1))
    recorder = Recorder(tmp_path / "right.zip")
    assert recorder.wants(kernel, 512)
    for _ in range(2):
        recorder.add(kernel, (1, 1, 1), [], before, [array.tobytes() for array in arrays])
    assert not recorder.wants(kernel, 512), "two of a kernel are enough"
    recorder.close()
    results = repeat(tmp_path / "right.zip", seconds=60)
    assert (results["dispatches"], results["equal"], results["wrong"]) == (2, 2, [])

    arrays[names["y"]][7] += 1
    recorder = Recorder(tmp_path / "wrong.zip")
    recorder.add(kernel, (1, 1, 1), [], before, [array.tobytes() for array in arrays])
    recorder.close()
    (wrong,) = repeat(tmp_path / "wrong.zip", seconds=60)["wrong"]
    assert wrong["kernel"] == kernel.name
    assert wrong["error"] == pytest.approx(1 / 126)
    with zipfile.ZipFile(tmp_path / "wrong.zip") as archive:
        (entry,) = json.loads(archive.read("dispatches.json"))
    assert "test_a_dispatch_is_repeated" in entry["test"]


def test_distances() -> None:
    nan = np.array([1, np.nan], "float32")
    assert distance(nan, nan) == 0
    assert distance(nan, np.array([1, 2], "float32")) == float("inf")
    assert distance(np.array([1, 2]), np.array([1, 3])) == float("inf"), "integers are equal or not"
    assert distance(np.array([4.0, 1.0]), np.array([4.0, 2.0])) == 0.25
