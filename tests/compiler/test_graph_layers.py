"""What layers of a graph may stand beside, and which are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.compiler.test_graph import close, tensor
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


@pytest.mark.parametrize("exempt", [(), ("w",)], ids=["phase", "dense"])
def test_a_matrix_on_the_left_may_be_all_there_is(tmp_path: Path, exempt) -> None:
    w = weight(8, 16)
    nodes = [helper.make_node("MatMul", ["w", "x"], ["y"], "left")]
    inputs, outputs = {"x": (FLOAT, [16, "n"])}, {"y": (FLOAT, [8, "n"])}
    path = make_onnx(tmp_path / "m.onnx", nodes, inputs, outputs, {"w": w})
    fc.build(path, act="float", exempt=exempt, output=tmp_path / "out")
    x = weight(16, 3, seed=1)
    used = w if exempt else fc.quantize(w, "w2", method="alternating").dequantize()
    with fc.load(tmp_path / "out") as model:
        close(model.run(x)["y"], used.astype(np.float64) @ x, 1e-5)


def test_a_layer_before_a_branch_compiles(tmp_path: Path) -> None:
    """Where a graph branches, its bindings are in no dataflow block."""
    node, w = helper.make_node, weight(16, 8)

    def branch(value: float):
        name = f"out{value:g}"
        nodes = [
            node("Constant", [], [f"k{name}"], value=tensor(np.float32(value))),
            node("Mul", ["h", f"k{name}"], [name]),
        ]
        return helper.make_graph(
            nodes, "branch", [], [helper.make_tensor_value_info(name, FLOAT, None)]
        )

    nodes = [
        node("MatMul", ["x", "w"], ["h"], "layer"),
        node("Constant", [], ["zero"], "zero", value=tensor(np.float32(0))),
        node("ReduceSum", ["h"], ["sum"], "sum", keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"], "greater"),
        node("If", ["positive"], ["y"], "if", then_branch=branch(2.0), else_branch=branch(3.0)),
    ]
    inputs, outputs = {"x": (FLOAT, ["n", 16])}, {"y": (FLOAT, ["n", 8])}
    path = make_onnx(tmp_path / "m.onnx", nodes, inputs, outputs, {"w": w})
    fc.build(path, act="float", exempt="*", output=tmp_path / "out")
    x = weight(3, 16, seed=1)
    with fc.load(tmp_path / "out") as model:
        for sign in (1, -1):
            h = (sign * x.astype(np.float64)) @ w
            close(model.run(sign * x)["y"], h * (2 if h.sum() > 0 else 3), 1e-5)
