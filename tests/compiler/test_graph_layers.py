"""Which layers of a graph are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.tiny_graphs import FLOAT, helper, make_onnx, weight


@pytest.mark.parametrize("shape", [(16, 0), (0, 16)])
@pytest.mark.parametrize("exempt", [(), "*"])
def test_a_weight_without_elements_is_named(tmp_path: Path, shape, exempt) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"], "one"),
        helper.make_node("MatMul", ["z", "none"], ["e"], "other"),
    ]
    path = make_onnx(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, [4, 16]), "z": (FLOAT, [4, shape[0]])},
        {"y": (FLOAT, [4, 16]), "e": (FLOAT, [4, shape[1]])},
        {"a": weight(16, 16), "none": np.zeros(shape, np.float32)},
    )
    with pytest.raises(fc.errors.UnsupportedError, match=r"weight none has the shape \[.*no elem"):
        fc.build(path, exempt=exempt, output=tmp_path / "out")
