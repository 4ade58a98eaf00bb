"""Graphs built, loaded and compared with onnxruntime and PyTorch on the same phase weights.

With ``--act float`` kernels differ from the reference by float32 rounding alone: 1e-4 of the
outputs' size is the promise, 1e-6 what is seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fairy_compile as fc
from tests.tiny_graphs import (
    FLOAT,
    ConvNet,
    dynamic,
    encoder,
    helper,
    make_onnx,
    mlp_onnx,
    phase_valued,
    tokens,
    weight,
    with_phase_values,
)

TOLERANCE = 1e-4


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


def run_onnx(model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime (extra test)")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory) -> tuple[Path, Path, fc.compiler.BuildReport]:
    directory = tmp_path_factory.mktemp("mlp")
    path = mlp_onnx(directory / "mlp.onnx")
    report = fc.build(path, act="float", output=directory / "out")
    return path, directory / "out", report


def test_mlp_agrees_with_onnxruntime(mlp) -> None:
    path, out, _ = mlp
    reference = with_phase_values(path)
    with fc.load(out) as model:
        for batch in (1, 3, 17):
            x = weight(batch, 32, seed=batch)
            close(model.run({"x": x})["y"], run_onnx(reference, {"x": x})[0])


def test_report_names_layers_kernels_and_reasons(mlp) -> None:
    _, _, report = mlp
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["fc1", "fc2", "fc3"]
    assert rows["fc2"].shape == (48, 64)
    assert (rows["fc2"].stages, rows["fc2"].terms, rows["fc2"].scale) == (2, "UW", "tensor")
    assert (rows["fc3"].kernel, rows["fc3"].reason) == ("dense", "odd dimension 7")
    assert "1 of 3 linear layers stay dense" in "".join(report.notes)
    assert json.loads(json.dumps(report.to_json()))["family"] == "onnx graph"


def test_artifact_is_a_graph_and_passes_verify(mlp) -> None:
    _, out, report = mlp
    checked = fc.verify(out)
    assert not checked.warnings
    manifest = checked.manifest
    assert manifest.kind == "graph"
    assert set(manifest.functions) == {"main", "_metadata"}
    assert manifest.metadata["inputs"] == [
        {"name": "x", "shape": ["batch", 32], "dtype": "float32"}
    ]
    assert manifest.source.files.keys() == {"mlp.onnx"}
    assert fc.inspect(out).kind == "graph artifact"
    assert {row.name for row in fc.inspect(out).layers} == {row.name for row in report.layers}


def test_int8_activations_err_as_the_contract_says(mlp, tmp_path: Path) -> None:
    path, out, exact_report = mlp
    report = fc.build(path, output=tmp_path / "out")  # int8 is the default, as for other builds
    assert fc.verify(tmp_path / "out").manifest.quant["act"] == "int8"
    x = weight(9, 32, seed=9)
    with fc.load(out) as exact, fc.load(tmp_path / "out") as rounded:
        want, got = exact.run(x)["y"], rounded.run(x)["y"]
    # (peak / rms) / (127 sqrt 12) a call; the peak of 32 values is at most sqrt 32 rms, and errors
    # of the two int8 calls add in squares. The dense layer and two ReLUs add none.
    calls = sum(row.act.startswith("int8") for row in report.layers)
    bound = np.sqrt(2 * 48) / (127 * np.sqrt(12))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= bound
    assert (error > 0) == (calls > 0)
    assert exact_report.layers[0].act == "float"


def test_encoder_with_dynamic_shapes_agrees_with_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it (extra onnx)")
    path = tmp_path / "encoder.onnx"
    torch.onnx.export(
        encoder(), tokens(2, 8), path, dynamo=True, verbose=False, external_data=True,
        input_names=["ids", "mask"], output_names=["hidden"],
        dynamic_shapes=dynamic("ids", "mask"),
    )  # fmt: skip
    report = fc.build(path, act="float", output=tmp_path / "out")
    assert [row.name for row in report.layers] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("qkv", "out", "up", "down")
    ]
    assert all(row.stages == 2 for row in report.layers)
    assert "4 matmul of two activations" in " ".join(report.notes)
    reference = with_phase_values(path)
    with fc.load(tmp_path / "out") as model:
        assert [info.shape for info in model.inputs] == [("batch", "length")] * 2
        for batch, length in ((2, 8), (1, 5), (3, 1)):
            ids, mask = (t.numpy() for t in tokens(batch, length))
            inputs = {"ids": ids, "mask": mask}
            close(model.run(inputs)["hidden"], run_onnx(reference, inputs)[0])


def test_torch_encoder_agrees_with_torch(tmp_path: Path) -> None:
    module, auto = encoder(), torch.export.Dim.AUTO
    report = fc.build(
        module,
        tokens(2, 8),
        dynamic_shapes=({0: auto, 1: auto},) * 2,
        act="float",
        output=tmp_path / "out",
    )
    assert report.model == "Encoder"
    assert len(report.layers) == 8
    reference = phase_valued(module)
    with fc.load(tmp_path / "out") as model, torch.no_grad():
        for batch, length in ((2, 8), (1, 5)):
            inputs = tokens(batch, length)
            (ours,) = model.run([t.numpy() for t in inputs]).values()
            close(ours, reference(*inputs).numpy())
    assert isinstance(module.layers[0].qkv, torch.nn.Linear)  # the caller's module is as it was


def test_convolutions_stay_and_the_linear_layer_is_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ConvNet().eval()
    x = torch.randn(2, 3, 16, 16)
    report = fc.build(
        module,
        (x,),
        dynamic_shapes=({0: torch.export.Dim.AUTO},),
        act="float",
        output=tmp_path / "out",
    )
    assert [row.name for row in report.layers] == ["fc"]
    assert "2 conv2d" in " ".join(report.notes)
    with fc.load(tmp_path / "out") as model, torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 3, 16, 16)
            (ours,) = model.run(x.numpy()).values()
            close(ours, phase_valued(module)(x).numpy())


def test_float16_model_keeps_its_types(tmp_path: Path) -> None:
    path = mlp_onnx(tmp_path / "mlp.onnx", np.float16)
    fc.build(path, act="float", output=tmp_path / "out")
    x = weight(4, 32, seed=1)
    wide = with_phase_values(mlp_onnx(tmp_path / "wide.onnx"))
    with fc.load(tmp_path / "out") as model:
        y = model.run(x.astype(np.float16))["y"]
    assert y.dtype == np.float16
    # Inputs, weights and every result between layers are rounded to 2^-11 relative, six times.
    close(y.astype(np.float32), run_onnx(wide, {"x": x})[0], 6 * 2.0**-11 * 4)


def test_zoo_of_linear_layers(tmp_path: Path) -> None:
    """Whatever the matrix passes on its way to the product, and on whichever side it stands."""
    node = helper.make_node
    a, b, c = weight(24, 16, seed=1), weight(16, 24, seed=2), weight(24, 16, seed=3)
    half, flat, cube = a.astype(np.float16), weight(24 * 16, seed=4), weight(2, 16, 24, seed=5)
    nodes = [
        node("Transpose", ["a"], ["at"], "turn", perm=[1, 0]),
        node("Identity", ["at"], ["at2"], "same"),
        node("MatMul", ["x", "at2"], ["y0"], "behind_transpose"),
        node("MatMul", ["x", "at2"], ["y1"], "shares"),
        node("Cast", ["half"], ["wide"], "cast", to=FLOAT),
        node("Gemm", ["x2", "wide", "bias"], ["y2"], "gemm", transB=1, alpha=0.5, beta=2.0),
        node("Constant", [], ["sizes"], "const", value=tensor(np.array([16, 24]))),
        node("Reshape", ["flat", "sizes"], ["b2"], "shape"),
        node("MatMul", ["x", "b2"], ["y3"], "behind_reshape"),
        node("MatMul", ["c", "xt"], ["y4"], "matrix_on_the_left"),
        node("MatMul", ["x", "b"], ["y5"], "plain"),
        node("MatMul", ["x", "cube"], ["y6"], "batched_weight"),
        node("MatMul", ["v", "b"], ["y7"], "vector"),
        node("Constant", [], ["d"], "const", value=tensor(b)),
        node("MatMul", ["x", "d"], ["y8"], "constant_node"),
    ]  # fmt: skip
    ranks = (3, 3, 2, 3, 3, 3, 3, 1, 3)
    outputs = {f"y{i}": (FLOAT, [f"y{i}_{k}" for k in range(r)]) for i, r in enumerate(ranks)}
    weights = {"a": a, "half": half, "bias": weight(24), "flat": flat, "c": c, "b": b, "cube": cube}
    inputs = {
        "x": (FLOAT, [2, "n", 16]),
        "x2": (FLOAT, ["n", 16]),
        "xt": (FLOAT, [2, 16, "n"]),
        "v": (FLOAT, [16]),
    }
    path = make_onnx(tmp_path / "zoo.onnx", nodes, inputs, outputs, weights)
    report = fc.build(path, act="float", output=tmp_path / "out")
    rows = {row.name: row for row in report.layers}
    assert "2 nodes share this weight" in rows["a"].reason
    assert "2 nodes share this weight" in rows["b"].reason
    assert "3 dimensions" in rows["cube"].reason
    assert rows["cube"].stages == 0
    assert rows["c"].shape == rows["a"].shape == (24, 16)
    assert len(rows) == 7

    def phase(dense: np.ndarray) -> np.ndarray:
        return fc.quantize(dense, "w2", method="alternating").dequantize().astype(np.float64)

    n = 5
    x, v = weight(2, n, 16, seed=7), weight(16, seed=8)
    x2, xt = weight(n, 16, seed=9), weight(2, 16, n, seed=10)
    want = [
        x @ phase(a).T,
        x @ phase(a).T,
        0.5 * x2 @ phase(half.astype(np.float32)).T + 2 * weights["bias"],
        x @ phase(flat.reshape(16, 24).T).T,
        phase(c) @ xt,
        x @ phase(b.T).T,
        x @ cube,
        v @ phase(b.T).T,
        x @ phase(b.T).T,
    ]
    with fc.load(tmp_path / "out") as model:
        got = model.run({"x": x, "x2": x2, "xt": xt, "v": v})
    for ours, theirs in zip(got.values(), want, strict=True):
        close(ours, theirs)


def tensor(array: np.ndarray):
    from onnx import numpy_helper

    return numpy_helper.from_array(array)


def test_a_tied_embedding_is_looked_up_dense_and_multiplied_in_phases(tmp_path: Path) -> None:
    """One weight, two uses: as a table and, turned either way, as matrices."""
    table = weight(16, 16)
    nodes = [
        helper.make_node("Gather", ["embed.weight", "ids"], ["x"], "lookup"),
        helper.make_node("Transpose", ["embed.weight"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], "head"),
        helper.make_node("MatMul", ["x", "embed.weight"], ["z"], "other"),
    ]
    path = make_onnx(
        tmp_path / "tied.onnx",
        nodes,
        {"ids": (7, ["n"])},
        {name: (FLOAT, ["n", 16]) for name in ("x", "y", "z")},
        {"embed.weight": table},
    )
    report = fc.build(path, act="float", output=tmp_path / "out")
    assert [row.name for row in report.layers] == ["embed", "embed_"]
    ids = np.array([0, 3, 15])
    with fc.load(tmp_path / "out") as model:
        got = model.run(ids)
        outside = model.run(np.array([0, 16, -17]))["x"]
    np.testing.assert_array_equal(got["x"], table[ids])
    for name, dense in (("y", table), ("z", table.T.copy())):
        values = fc.quantize(dense, "w2", method="alternating").dequantize()
        close(got[name], table[ids] @ values.T)
    assert np.isnan(outside[1:]).all()  # no reading outside of the table
    assert np.isfinite(outside[0]).all()


def test_exempt_layers_stay_dense(tmp_path: Path) -> None:
    path = mlp_onnx(tmp_path / "mlp.onnx")
    report = fc.build(path, exempt=["fc1"], quant="w1", dry_run=True)
    assert [row.stages for row in report.layers] == [0, 1, 0]
    assert "exempt" in report.layers[0].reason
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["x86-64-v3", "arm64-linux"])
def test_every_kind_of_cpu_target_builds(tmp_path: Path, target: str) -> None:
    from fairy_compile.compiler.export import check_linker
    from fairy_compile.targets import load_target

    try:
        check_linker(load_target(target))
    except fc.FairyError as error:
        pytest.skip(str(error))
    path = mlp_onnx(tmp_path / "mlp.onnx")
    report = fc.build(path, target=target, output=tmp_path / "out")
    family = "arm.codebook" if "arm" in target else "x86.codebook"
    assert report.layers[0].kernel.startswith(family)
    fc.verify(tmp_path / "out")


def test_gpu_target_builds_where_everything_can_be_scheduled(tmp_path: Path) -> None:
    path = mlp_onnx(tmp_path / "mlp.onnx")
    report = fc.build(path, target="opencl", output=tmp_path / "out")
    assert report.layers[0].kernel.startswith("opencl")
    assert fc.verify(tmp_path / "out").manifest.target.device == "opencl"


def test_gpu_target_refuses_what_it_cannot_schedule(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "fc"),
        helper.make_node("ReduceMean", ["h"], ["y"], "mean", keepdims=0),
    ]
    path = make_onnx(
        tmp_path / "mean.onnx",
        nodes,
        {"x": (FLOAT, ["n", 16])},
        {"y": (FLOAT, [])},
        {"w": weight(16, 8)},
    )
    with pytest.raises(fc.UnsupportedError, match=r"opencl.*reduces.*--target cpu"):
        fc.build(path, target="opencl", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_cpu_cannot_schedule_is_not_sent_to_the_cpu(tmp_path: Path) -> None:
    class Sorted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(x).sort(dim=-1).values

    with pytest.raises(fc.UnsupportedError, match=r"for target cpu: .*; leave those operators out"):
        fc.build(Sorted(), (torch.ones(2, 16),), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 64}, "--context is for language models"),
        ({"max_batch": 4}, "--max-batch is for language models"),
        ({"bits": 2.2}, "--bits is for language models"),
        ({"calibrate": "text.txt"}, "--calibrate is for language models"),
        ({"method": "gptq"}, "--method gptq is for language models"),
        ({"quant": fc.QuantConfig("w1", terms=("W",))}, "cannot take the terms"),
        ({"example_inputs": [1]}, "for PyTorch modules"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options, words: str) -> None:
    path = mlp_onnx(tmp_path / "mlp.onnx")
    with pytest.raises(fc.FairyError, match=words) as error:
        fc.build(path, output=tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_graph_without_linear_layers_is_refused(tmp_path: Path) -> None:
    path = make_onnx(
        tmp_path / "relu.onnx",
        [helper.make_node("Relu", ["x"], ["y"], "r")],
        {"x": (FLOAT, [2])},
        {"y": (FLOAT, [2])},
        {},
    )
    with pytest.raises(fc.FairyError, match="no linear layer"):
        fc.build(path, output=tmp_path / "out")


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    bad = weight(16, 8)
    bad[3, 5] = np.nan
    path = make_onnx(
        tmp_path / "nan.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")],
        {"x": (FLOAT, ["n", 16])},
        {"y": (FLOAT, ["n", 8])},
        {"w": bad},
    )
    with pytest.raises(fc.FairyError, match="non-finite"):
        fc.build(path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Shared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))))


def test_shared_float16_weights_of_a_module_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Shared().half(), torch.randn(3, 16).half()
    report = fc.build(module, x, act="float", output=tmp_path / "out")
    (row,) = report.layers
    assert "2 nodes share this weight" in row.reason
    with fc.load(tmp_path / "out") as model, torch.no_grad():
        (ours,) = model.run(x.numpy()).values()
        theirs = phase_valued(module.float())(x.float()).numpy()
    assert ours.dtype == np.float16
    # Two layers, each rounding its result and the sum with its bias to 2^-11 relative.
    close(ours.astype(np.float32), theirs, 4 * 2.0**-11 * 4)
