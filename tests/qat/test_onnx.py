"""Trained modules through ONNX and directly: the same codes come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fairy_compile as fc
from tests.tiny_graphs import onnx

pytest.importorskip("onnxscript", reason="torch.onnx.export needs it (extra onnx)")
from fairy_compile.frontends.graph import GraphSource


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid = nn.Linear(32, 48), nn.Linear(48, 48, bias=False)
        self.down, self.odd = nn.Linear(48, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.mid(torch.relu(self.up(x))))
        return self.odd(torch.tanh(self.down(x)))


def trained(**quant) -> nn.Module:
    """Return a prepared module after a step of training, so that its latents are its own."""
    torch.manual_seed(0)
    model = Net()
    fc.qat.prepare(model, fc.QuantConfig(**quant))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(8, 32)).square().mean().backward()
    optimizer.step()
    return model.eval()


def sources(graph) -> GraphSource:
    from fairy_compile.compiler.graph import GraphWork
    from fairy_compile.targets import load_target

    return GraphWork(graph, fc.QuantConfig("w4"), load_target("cpu"))


@pytest.mark.parametrize(
    "quant",
    [{"quant": "w1"}, {"quant": "w2"}, {"quant": "w2", "stages_for": {"down": 1}}, {"quant": "w3"}],
)
def test_codes_come_back_from_onnx(tmp_path: Path, quant) -> None:
    from fairy_compile.frontends.onnx_import import import_onnx

    model = trained(**quant)
    path = fc.qat.export_onnx(model, tmp_path / "net.onnx", torch.randn(2, 32))
    work = sources(import_onnx(path))
    assert work.quant.quant == quant["quant"]  # not the w4 asked for
    layers = fc.qat.phase_layers(model)
    assert [m.layer for m in work.layers.matrices] == ["up", "mid", "down", "odd"]
    for name, layer in layers.items():
        want, got = layer.phase_tensor(), work.source.phase(name, work.quant)
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_allclose(got.scales, want.scales, rtol=1e-5)


def test_onnx_file_computes_what_the_module_does_in_any_runtime(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime (extra test)")
    model, x = trained(quant="w2"), torch.randn(4, 32)
    path = fc.qat.export_onnx(
        model, tmp_path / "net.onnx", x, input_names=["x"], output_names=["y"],
        dynamic_shapes={"x": {0: "batch"}},
    )  # fmt: skip
    with torch.no_grad():
        want = model(x).numpy()
    (theirs,) = ort.InferenceSession(path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(theirs, want, rtol=0, atol=1e-5)
    report = fc.build(path, act="float", output=tmp_path / "out")
    assert "brings its codes" in " ".join(report.notes)
    with fc.load(tmp_path / "out") as built:
        np.testing.assert_allclose(built.run(x.numpy())["y"], want, rtol=0, atol=1e-5)
    assert isinstance(model.up, fc.qat.PhaseLinear)  # the caller's module is as it was


def test_what_stayed_dense_in_training_stays_dense_in_a_module_and_its_file(tmp_path: Path) -> None:
    model = trained(exempt=("up",))
    x = torch.randn(2, 32)
    path = fc.qat.export_onnx(model, tmp_path / "net.onnx", x)
    for source in ((path,), (model, (x,)), (nn.Sequential(model), (x,))):
        report = fc.build(*source, act="float", output=tmp_path / "out", force=True)
        assert [layer.stages for layer in report.layers if "up" in layer.name] == [0]
        assert any("trained for w2" in note for note in report.notes)
        with fc.load(tmp_path / "out") as built, torch.no_grad():
            found = next(iter(built.run([x.numpy()]).values()))
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_prepared_module_brings_its_codes(tmp_path: Path) -> None:
    from fairy_compile.frontends.torch_module import import_torch

    model = trained(quant="w1")
    work = sources(import_torch(model, torch.randn(2, 32)))
    for name, layer in fc.qat.phase_layers(model).items():
        got = work.source.phase(name, work.quant)
        np.testing.assert_array_equal(got.codes, layer.phase_tensor().codes)
        assert work.source.plan(name, work.quant).stages == 1
    assert not work.source.plan("odd", work.quant).phase


def test_layers_too_small_to_tell_their_codes_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    fc.qat.prepare(model, "w2")
    with pytest.raises(fc.FairyError, match=r"0 \(4 x 4.*exempt"):
        fc.qat.export_onnx(model, tmp_path / "net.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_changed_weights_of_a_marked_file_are_refused(tmp_path: Path) -> None:
    path = fc.qat.export_onnx(trained(quant="w2"), tmp_path / "net.onnx", torch.randn(2, 32))
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "up.weight")
    values = onnx.numpy_helper.to_array(tensor) * np.linspace(1, 2, 32, dtype=np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), "up.weight"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(fc.FairyError, match=r"up does not hold the phase values.*--exempt up"):
        fc.build(path, output=tmp_path / "out")


def test_misuse_is_told(tmp_path: Path) -> None:
    x, out = torch.randn(2, 32), tmp_path / "net.onnx"
    with pytest.raises(fc.FairyError, match=r"fc\.qat\.prepare"):
        fc.qat.export_onnx(Net(), out, x)
    model = trained(quant="w2")
    with pytest.raises(fc.FairyError, match=r"ends in \.onnx"):
        fc.qat.export_onnx(model, tmp_path / "net.bin", x)
    with pytest.raises(fc.FairyError, match="opset is 9"):
        fc.qat.export_onnx(model, out, x, opset=9)
    with pytest.raises(fc.FairyError, match="opset is '18'"):
        fc.qat.export_onnx(model, out, x, opset="18")
    for inputs in (None, 3, (np.ones((2, 32), np.float32),)):
        with pytest.raises(fc.FairyError, match=r"example_inputs is .*; allowed: a tensor"):
            fc.qat.export_onnx(model, out, inputs)
    with pytest.raises(fc.UnsupportedError, match=r"cannot export .*\[2, 5\]"):
        fc.qat.export_onnx(model, out, torch.randn(2, 5))
    with pytest.raises(fc.FairyError, match=r"is not in a directory: .*nowhere"):
        fc.qat.export_onnx(model, tmp_path / "nowhere" / "net.onnx", x)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(fc.FairyError, match="is a directory"):
        fc.qat.export_onnx(model, tmp_path / "folder.onnx", x, force=True)
    (tmp_path / "folder.onnx").rmdir()
    out.write_text("mine")
    with pytest.raises(fc.FairyError, match="force"):
        fc.qat.export_onnx(model, out, x)
    assert out.read_text() == "mine"
