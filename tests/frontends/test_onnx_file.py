"""ONNX files: what is set apart as weights, and what hostile or strange files are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.tiny_graphs import FLOAT, helper, make_onnx, mlp_onnx, numpy_helper, onnx, weight


def read(path: Path):
    from fairy_compile.frontends.onnx_file import read_onnx

    return read_onnx(path)


def external(path: Path, name: str = "w", **changes) -> Path:
    """Write a model whose weight lies in ``data.bin``, its record changed as told (None drops)."""
    array = weight(16, 8)
    make_onnx(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
        {"x": (FLOAT, ["n", 16])},
        {"y": (FLOAT, ["n", 8])},
        {"w": array},
    )
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    record = {"location": "data.bin", "offset": "64", "length": str(array.nbytes)} | changes
    for key, value in record.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    if not (path.parent / "data.bin").exists():
        (path.parent / "data.bin").write_bytes(bytes(64) + array.tobytes())
    return path


def test_weights_become_trailing_inputs_with_the_names_of_their_modules(tmp_path: Path) -> None:
    file = read(mlp_onnx(tmp_path / "mlp.onnx"))
    assert (file.inputs, file.outputs) == (("x",), ("y",))
    layers = {name: (w.layer, w.shape, w.dtype) for name, w in file.weights.items()}
    assert layers == {
        "fc1.weight": ("fc1", (64, 32), "float32"),
        "onnx::MatMul_9": ("fc2", (64, 48), "float32"),
        "fc3.weight": ("fc3", (7, 48), "float32"),
    }
    assert [value.name for value in file.model.graph.input] == ["x", *layers]
    assert {t.name for t in file.model.graph.initializer} == {"fc1.bias", "fc2.bias", "fc3.bias"}
    np.testing.assert_array_equal(file.weights["fc1.weight"].read(), weight(64, 32))


def test_layers_are_called_after_the_scopes_that_pytorch_notes(tmp_path: Path) -> None:
    path = make_onnx(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "val_7"], ["y"], "node_MatMul_3")],
        {"x": (FLOAT, ["n", 16])},
        {"y": (FLOAT, ["n", 8])},
        {"val_7": weight(16, 8)},
    )
    model = onnx.load(path)
    scopes = "['', 'encoder', 'encoder.layer.0', 'linear']"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    path.write_bytes(model.SerializeToString())
    assert read(path).weights["val_7"].layer == "encoder.layer.0"


def test_weights_with_other_readers_stay_in_the_graph(tmp_path: Path) -> None:
    """Where it is also added, returned or read in a branch, a weight is left where it is."""
    node = helper.make_node
    value = helper.make_tensor_value_info
    branch = helper.make_graph(
        [node("MatMul", ["x", "inner"], ["b"], "in")], "b", [], [value("b", FLOAT, None)]
    )
    path = make_onnx(
        tmp_path / "m.onnx",
        [
            node("MatMul", ["x", "added"], ["h"], "fc"),
            node("Add", ["h", "added"], ["y"], "add"),
            node("MatMul", ["x", "returned"], ["z"], "fc2"),
            node("If", ["c"], ["i"], "if", then_branch=branch, else_branch=branch),
        ],
        {"x": (FLOAT, [4, 4]), "c": (9, [])},
        {"y": (FLOAT, [4, 4]), "returned": (FLOAT, [4, 4]), "i": (FLOAT, [4, 4])},
        {name: weight(4, 4) for name in ("added", "returned", "inner")},
    )
    assert read(path).weights == {}


def test_external_data_is_read_when_it_is_needed(tmp_path: Path) -> None:
    file = read(external(tmp_path / "m.onnx"))
    assert [p.name for p in file.files] == ["m.onnx", "data.bin"]
    np.testing.assert_array_equal(file.weights["w"].read(), weight(16, 8))
    (tmp_path / "data.bin").write_bytes(bytes(100))
    with pytest.raises(fc.ModelFileError, match=r"data\.bin"):
        file.weights["w"].read()


def test_external_data_through_a_link_inside_the_directory(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx")
    (tmp_path / "data.bin").rename(tmp_path / "other.bin")
    (tmp_path / "data.bin").symlink_to("other.bin")
    assert read(path).weights["w"].read().shape == (16, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"location": "../secret"}, "refused"),
        ({"location": "/etc/passwd"}, "absolute"),
        ({"location": "a\\b"}, "backslash"),
        ({"location": "sub/../../secret"}, "refused"),
        ({"location": ""}, "empty"),
        ({"location": None}, "empty"),
        ({"location": "nothing.bin"}, "missing"),
        ({"location": "."}, "refused"),
        ({"offset": "-64"}, "offset"),
        ({"offset": "1e3"}, "offset"),
        ({"offset": "65"}, "truncated"),
        ({"offset": "999999999999999999"}, "truncated"),
        ({"offset": "9" * 30}, "offset"),
        ({"length": "8"}, "length"),
        ({"length": "-1"}, "length"),
    ],
)
def test_hostile_external_data_is_refused(tmp_path: Path, changes, words: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    path = external(inside / "m.onnx", **changes)
    with pytest.raises(fc.ModelFileError, match=words) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (inside / "data.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(fc.ModelFileError, match="outside the model directory"):
        read(external(inside / "m.onnx"))


def test_external_data_of_other_tensors_is_checked_too(tmp_path: Path) -> None:
    """Also of a tensor inside a node, which the importer would read by itself."""
    path = mlp_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "t")
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    node = model.graph.node.add(op_type="Constant", name="c", output=["unused"])
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(tensor)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(fc.ModelFileError, match="refused"):
        read(path)


def raw_data_too_short(model) -> None:
    model.graph.initializer[0].raw_data = b"1234"


def negative_dimension(model) -> None:
    model.graph.initializer[0].dims[0] = -64


def huge_dimension(model) -> None:
    model.graph.initializer[0].dims[0] = 1 << 62


def unknown_type(model) -> None:
    model.graph.initializer[0].data_type = 99


def cycle(model) -> None:
    model.graph.node[0].input[0] = "y"


def twice(model) -> None:
    model.graph.node[1].output[0] = "h1"


def custom_domain(model) -> None:
    model.graph.node[0].domain = "evil.ops"


def old_opset(model) -> None:
    model.opset_import[0].version = 9


def new_opset(model) -> None:
    model.opset_import[0].version = 99


def no_opset(model) -> None:
    del model.opset_import[:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (raw_data_too_short, "4 bytes; expected 8192"),
        (negative_dimension, "-64"),
        (huge_dimension, "bytes; expected"),
        (unknown_type, "99"),
        (cycle, "malformed"),
        (twice, "malformed"),
        (custom_domain, "/fc1/Gemm.*evil.ops"),
        (old_opset, "operator set 9; allowed: 13 to"),
        (new_opset, "operator set 99"),
        (no_opset, "operator set None"),
    ],
)
def test_malformed_models_are_refused(tmp_path: Path, damage, words: str) -> None:
    path = mlp_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    damage(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(fc.FairyError, match=words) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"not a model"])
def test_other_files_are_no_models(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(fc.FairyError, match=r"m\.onnx"):
        read(path)


def test_initializers_that_are_inputs_too_are_constants(tmp_path: Path) -> None:
    """Models of before 2019 list every initializer among the inputs."""
    path = mlp_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("fc1.weight", FLOAT, [64, 32]))
    path.write_bytes(model.SerializeToString())
    file = read(path)
    assert file.inputs == ("x",)
    assert "fc1.weight" in file.weights


def test_random_damage_is_told_in_one_line(tmp_path: Path) -> None:
    """A file with bytes changed, taken out or put in is read, or refused by a FairyError."""
    import random

    good = [mlp_onnx(tmp_path / "a.onnx").read_bytes(), external(tmp_path / "b.onnx").read_bytes()]
    rng, messages = random.Random(0), []
    for _ in range(150):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 6)):
            place = rng.choice([rng.randrange(100), len(data) - 1 - rng.randrange(100)])
            match rng.randrange(3):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randint(1, 8)]
                case _:
                    data[place:place] = rng.randbytes(rng.randint(1, 8))
        path = tmp_path / "damaged.onnx"
        path.write_bytes(data)
        try:
            for damaged in read(path).weights.values():
                damaged.read()
        except fc.FairyError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not [message for message in messages if "\n" in message]


def test_bfloat16_weights_inside_and_outside_of_the_file(tmp_path: Path) -> None:
    import ml_dtypes

    array = weight(16, 8).astype(ml_dtypes.bfloat16)
    path = external(tmp_path / "m.onnx", length=str(array.nbytes))
    (tmp_path / "data.bin").write_bytes(bytes(64) + array.tobytes())
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = onnx.TensorProto.BFLOAT16
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    path.write_bytes(model.SerializeToString())
    found = read(path).weights["w"]
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found.read(), array)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
    path.write_bytes(model.SerializeToString())
    np.testing.assert_array_equal(read(path).weights["w"].read(), array)
