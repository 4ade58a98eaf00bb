"""Divisions in graphs: as in onnxruntime, and no divisor that a caller passes stops the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.compiler.test_graph import run_onnx
from tests.tiny_graphs import FLOAT, INT64, helper, make_onnx, numpy_helper, onnx, weight

INT32 = onnx.TensorProto.INT32


def constant(name: str, value) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.asarray(value))
    return helper.make_node("Constant", [], [name], name, value=tensor)


@pytest.mark.parametrize(
    ("operator", "options", "divisor"),
    [
        ("Div", {}, np.float32(0)),
        ("Div", {}, np.float32(-0.0)),
        ("Div", {}, np.array([0, 1] * 8, np.float32)),
        ("Mod", {"fmod": 1}, np.float32(0)),
        ("Reciprocal", {}, np.float32(0)),
    ],
)
def test_floats_by_a_constant_zero(tmp_path: Path, operator, options, divisor) -> None:
    """Reciprocal adds 1 / 0 to the layer's result, the others divide it."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "layer"), constant("c", divisor)]
    if operator == "Reciprocal":
        nodes.append(helper.make_node("Reciprocal", ["c"], ["r"], "node"))
        nodes.append(helper.make_node("Add", ["h", "r"], ["y"], "sum"))
    else:
        nodes.append(helper.make_node(operator, ["h", "c"], ["y"], "node", **options))
    path = make_onnx(
        tmp_path / "model.onnx",
        nodes,
        {"x": (FLOAT, [4, 16])},
        {"y": (FLOAT, [4, 16])},
        {"w": weight(16, 16)},
    )
    fc.build(path, act="float", exempt="*", output=tmp_path / "out")
    x = weight(4, 16)
    x[0] = 0  # 0 / 0
    with fc.load(tmp_path / "out") as model:
        y = model.run(x)["y"]
    np.testing.assert_allclose(y, run_onnx(onnx.load(path), {"x": x})[0], rtol=1e-5, atol=1e-5)


def integers(tmp_path: Path, operator: str, element: int, divisor=None) -> Path:
    """Write a linear layer, and beside it a / c, or a % c, of integers."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "layer")]
    nodes += [] if divisor is None else [constant("c", divisor)]
    nodes.append(helper.make_node(operator, ["a", "c"], ["y"], "node"))
    inputs = {"x": (FLOAT, [1, 16]), "a": (element, [4]), "c": (element, [4])}
    if divisor is not None:
        del inputs["c"]
    return make_onnx(
        tmp_path / "model.onnx",
        nodes,
        inputs,
        {"h": (FLOAT, [1, 16]), "y": (element, [4])},
        {"w": weight(16, 16)},
    )


@pytest.mark.parametrize("element", [INT32, INT64])
@pytest.mark.parametrize("operator", ["Div", "Mod"])
def test_integers_by_any_number(tmp_path: Path, operator: str, element: int) -> None:
    path = integers(tmp_path, operator, element)
    fc.build(path, act="float", output=tmp_path / "out")
    dtype = helper.tensor_dtype_to_np_dtype(element)
    x, least = weight(1, 16), np.iinfo(dtype).min
    with fc.load(tmp_path / "out") as model:
        for a, c in (([7, -7, 7, -7], [2, 2, -2, -2]), ([0, 5, -6, least], [-1, -1, -1, 1])):
            inputs = {"x": x, "a": np.array(a, dtype), "c": np.array(c, dtype)}
            want = run_onnx(onnx.load(path), inputs)[1]
            np.testing.assert_array_equal(model.run(inputs)["y"], want)
        a, c = np.array([7, -7, least, 9], dtype), np.array([0, 0, -1, 2], dtype)
        y = model.run({"x": x, "a": a, "c": c})["y"]  # which would stop the process
    np.testing.assert_array_equal(y, [0, 0, least, 4] if operator == "Div" else [0, 0, 0, 1])


def test_integers_by_constants(tmp_path: Path) -> None:
    path = integers(tmp_path, "Mod", INT64, np.array([3, -1, 2, -3]))
    fc.build(path, act="float", output=tmp_path / "out")
    inputs = {"x": weight(1, 16), "a": np.array([-7, 5, 3, 8])}
    with fc.load(tmp_path / "out") as model:
        want = run_onnx(onnx.load(path), inputs)[1]
        np.testing.assert_array_equal(model.run(inputs)["y"], want)


@pytest.mark.parametrize(("operator", "words"), [("Mod", "constant 0"), ("Div", "divisor value 0")])
def test_integers_by_a_constant_zero_are_refused(tmp_path: Path, operator, words) -> None:
    path = integers(tmp_path, operator, INT64, np.array([1, 0, 2, 3]))
    with pytest.raises(fc.errors.UnsupportedError, match=words):
        fc.build(path, output=tmp_path / "out")
