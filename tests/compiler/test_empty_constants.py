"""Constants without elements: artifacts with them load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fairy_compile as fc
from tests.compiler.test_graph import run_onnx
from tests.frontends.test_torch_ops import check
from tests.tiny_graphs import FLOAT, INT64, helper, make_onnx, onnx, weight


def test_arrays_without_elements_that_a_module_makes(tmp_path: Path) -> None:
    check(
        tmp_path,
        [
            lambda h, i: torch.cat([h, torch.zeros(4, 0)], 1),
            lambda h, i: torch.cat([torch.ones(4, 0) * 2, h, h[:, 5:5]], 1),
            lambda h, i: torch.zeros(4, 0),
            lambda h, i: torch.zeros(0, 3, dtype=torch.int64),
            lambda h, i: h @ torch.zeros(8, 0),
            lambda h, i: h[:, :0] @ torch.zeros(0, 3),
            lambda h, i: h + (torch.zeros(4, 0) + 1).sum(1, keepdim=True),
            lambda h, i: torch.cat([i, torch.zeros(0, dtype=torch.int64)]),
        ],
    )


def test_they_may_lie_in_a_branch(tmp_path: Path) -> None:
    def branch(h: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return torch.cond(
            i[0] < 0,
            lambda x: torch.cat([x, torch.zeros(4, 0)], 1),
            lambda x: torch.relu(torch.cat([torch.zeros(0, 8), x], 0)),
            (h,),
        )

    check(tmp_path, [branch])


@pytest.mark.parametrize("how", ["Constant", "ConstantOfShape"])
def test_constants_of_onnx(tmp_path: Path, how: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "layer")]
    if how == "Constant":
        value = onnx.numpy_helper.from_array(np.zeros((4, 0), np.float32))
        nodes.append(helper.make_node("Constant", [], ["e"], "none", value=value))
    else:
        nodes.append(helper.make_node("ConstantOfShape", ["shape"], ["e"], "none"))
    nodes.append(helper.make_node("Concat", ["h", "e"], ["y"], "cat", axis=1))
    nodes.append(helper.make_node("Cast", ["e"], ["z"], "cast", to=INT64))
    path = make_onnx(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, [4, 16])},
        {"y": (FLOAT, [4, 16]), "z": (INT64, [4, 0])},
        {"w": weight(16, 16), "shape": np.array([4, 0])},
    )
    fc.build(path, act="float", exempt="*", output=tmp_path / "out")
    x = weight(4, 16)
    with fc.load(tmp_path / "out") as model:
        found = model.run(x)
    y, z = run_onnx(onnx.load(path), {"x": x})
    np.testing.assert_allclose(found["y"], y, rtol=1e-5, atol=1e-5)  # as of sums of 16 products
    assert found["z"].shape == z.shape
    assert found["z"].dtype == z.dtype
