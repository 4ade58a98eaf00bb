"""TVM's importer with what it loses mended, and errors that name the node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.tiny_graphs import FLOAT, INT64, helper, make_onnx, mlp_onnx, numpy_helper, weight


def import_(path: Path):
    from fairy_compile.frontends.onnx_import import import_onnx

    return import_onnx(path)


def dims(ty) -> list[int | str]:
    return [int(d) if hasattr(d, "value") else str(d) for d in ty.shape]


def constant(name: str, values) -> object:
    array = np.array(values, np.int64)
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def test_graph_has_the_models_names_and_dimensions(tmp_path: Path) -> None:
    graph = import_(mlp_onnx(tmp_path / "mlp.onnx"))
    assert (graph.kind, graph.inputs, graph.outputs) == ("onnx", ("x",), ("y",))
    first, *weights = graph.module["main"].params
    assert dims(first.ty) == ["batch", 32]
    assert len(weights) == len(graph.weights) == 3
    assert graph.files.keys() == {"mlp.onnx"}


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_operator_sets(tmp_path: Path, opset: int) -> None:
    assert import_(mlp_onnx(tmp_path / "mlp.onnx", opset=opset)).weights


def test_unknown_operator_names_the_node(tmp_path: Path) -> None:
    path = make_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Det", ["x"], ["y"], "the_node")],
        {"x": (FLOAT, [4, 4])},
        {"y": (FLOAT, [])},
        {},
    )
    with pytest.raises(fc.UnsupportedError, match=r"'the_node'.*'Det'.*does not know"):
        import_(path)


def test_failing_conversion_names_the_node_and_prints_nothing(tmp_path: Path, capfd) -> None:
    path = make_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("Reshape", ["x", "s"], ["y"], "the_node")],
        {"x": (FLOAT, [3, 4]), "s": (INT64, ["k"])},
        {"y": (FLOAT, ["a"])},
        {},
    )
    with pytest.raises(fc.UnsupportedError, match=r"'the_node' \(Reshape\)") as error:
        import_(path)
    assert "\n" not in str(error.value)
    assert not capfd.readouterr().out


def test_lost_shapes_come_back_from_what_the_model_says(tmp_path: Path) -> None:
    """A range over a dimension of an input is as long as that dimension."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["s"], "shape"),
        constant("one", [1]),
        node("Gather", ["s", "one"], ["n1"], "gather"),
        node("Squeeze", ["n1"], ["n"], "squeeze"),
        constant("zero", 0),
        constant("step", 1),
        node("Range", ["zero", "n", "step"], ["r"], "range"),
        node("Cast", ["r"], ["f"], "cast", to=FLOAT),
        node("Add", ["x", "f"], ["y"], "add"),
    ]
    path = make_onnx(
        tmp_path / "m.onnx", nodes, {"x": (FLOAT, [2, "n"])}, {"y": (FLOAT, [2, "n"])}, {}
    )
    assert dims(import_(path).module["main"].ret_ty) == [2, "n"]


def test_constants_and_shapes_that_tvm_fails_on(tmp_path: Path) -> None:
    """A scalar by ConstantOfShape, the shape of a shape, a dimension reshaped to a vector."""
    node = helper.make_node
    nodes = [
        node("ConstantOfShape", ["none"], ["c"], "fill"),
        node("Shape", ["x"], ["s"], "shape"),
        constant("zero", 0),
        node("Gather", ["s", "zero"], ["n"], "gather"),
        constant("row", [-1]),
        node("Reshape", ["n", "row"], ["n1"], "reshape"),
        constant("cols", [16]),
        node("Concat", ["n1", "cols"], ["to"], "concat", axis=0),
        node("Reshape", ["x", "to"], ["x1"], "back"),
        node("MatMul", ["x1", "w"], ["h"], "fc"),
        node("Add", ["h", "c"], ["y"], "add"),
    ]
    path = make_onnx(
        tmp_path / "m.onnx",
        nodes,
        {"x": (FLOAT, ["n", 16])},
        {"y": (FLOAT, ["n", 8])},
        {"none": np.zeros(0, np.int64), "w": weight(16, 8)},
    )
    assert dims(import_(path).module["main"].ret_ty) == ["n", 8]


def test_marks_of_training_are_checked(tmp_path: Path) -> None:
    import onnx

    path = mlp_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.metadata_props.add(key="fairy_compile.trained", value='{"quant": "w9"}')
    path.write_bytes(model.SerializeToString())
    with pytest.raises(fc.ModelFileError, match="quantization_config"):
        import_(path)


@pytest.mark.slow
def test_bert_of_transformers_with_dynamic_shapes(tmp_path: Path) -> None:
    """The whole way of a published encoder: its code, PyTorch's exporter, our build."""
    import torch

    from tests.compiler.test_graph import close, run_onnx
    from tests.tiny_graphs import dynamic, tokens, with_phase_values

    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it (extra onnx)")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    path = tmp_path / "bert.onnx"
    torch.onnx.export(
        hidden_states(model), tokens(2, 8), path, dynamo=True, verbose=False, external_data=False,
        input_names=["ids", "mask"], output_names=["hidden"],
        dynamic_shapes=dynamic("ids", "mask"),
    )  # fmt: skip
    report = fc.build(path, act="float", output=tmp_path / "out")
    names = {row.name for row in report.layers}
    assert "model.encoder.layer.1.attention.self.query" in names
    assert len(names) == 12
    reference = with_phase_values(path)
    with fc.load(tmp_path / "out") as built:
        for batch, length in ((2, 8), (3, 5)):
            ids, mask = (t.numpy() for t in tokens(batch, length))
            (want,) = run_onnx(reference, {"ids": ids, "mask": mask})
            close(built.run([ids, mask])["hidden"], want)


def hidden_states(model):
    """Return a module of ids and mask, the form the exporter takes."""
    import torch

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    return Hidden()


def test_results_have_the_dtype_that_onnx_gives_them(tmp_path: Path) -> None:
    """TVM's OneHot gives float64 and int64, whatever its values are."""
    node = helper.make_node
    values = numpy_helper.from_array(np.array([0, 1], np.float32))
    nodes = [
        constant("depth", 8),
        node("Constant", [], ["values"], "values", value=values),
        node("OneHot", ["ids", "depth", "values"], ["hot"], "hot"),
        constant("two", 2),
        node("Pow", ["x", "two"], ["square"], "square"),  # an exponent of another type
        node("Add", ["hot", "square"], ["y"], "add"),
    ]
    path = make_onnx(
        tmp_path / "m.onnx",
        nodes,
        {"ids": (INT64, ["n"]), "x": (FLOAT, ["n", 8])},
        {"y": (FLOAT, ["n", 8])},
        {},
    )
    result = import_(path).module["main"].ret_ty
    assert (str(result.dtype), dims(result)) == ("float32", ["n", 8])
