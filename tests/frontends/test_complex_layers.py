"""Published iFairy directories as sources, converted, and refused where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fairy_compile as fc
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends import open_source
from fairy_compile.phase import phase_codes
from tests.tiny_ifairy import phase_values, save_ifairy

LAYER = "layer.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ifairy(tmp_path_factory.mktemp("ifairy") / "model")


def test_complex_layers_appear_as_real_maps(model: Path) -> None:
    source, stored = open_source(model), load_file(str(model / "model.safetensors"))
    assert source.kind == "huggingface"
    assert not [name for name in source.names() if name.startswith(f"{LAYER}.weight_")]
    assert "layer.0.pre_layernorm.weight_imag" in source.names()
    re, im = (stored[f"{LAYER}.weight_{part}"] for part in ("real", "imag"))
    assert source.shape(f"{LAYER}.weight") == (2 * re.shape[0], 2 * re.shape[1])
    x = np.random.default_rng(0).standard_normal((3, 2 * re.shape[1])).astype(np.float32)
    half = re.shape[1]
    y = (x[:, :half] - 1j * x[:, half:]) @ (re + 1j * im).T
    want = np.concatenate([y.real, y.imag], axis=1)
    np.testing.assert_allclose(x @ source.dense(f"{LAYER}.weight").T, want, atol=1e-5)


def test_codes_are_those_of_the_published_rule(model: Path) -> None:
    source, stored = open_source(model), load_file(str(model / "model.safetensors"))
    quant, note = source.settle(fc.QuantConfig("w2"))
    assert (quant.quant, quant.terms, quant.method) == ("w1", ("W",), "phase")
    assert "T = 1" in note
    re, im = (stored[f"{LAYER}.weight_{part}"] for part in ("real", "imag"))
    tensor = source.phase(LAYER, quant)
    assert (tensor.stages, tensor.terms) == (1, ("W",))
    np.testing.assert_array_equal(tensor.unpack()[0, 0], phase_codes(re, im))
    seen_re, seen_im = tensor.dequantize_terms()["W"]
    want = phase_values(re + 1j * im)
    np.testing.assert_allclose(seen_re + 1j * seen_im, want, rtol=1e-6)
    assert not source.plan("lm_head", quant).phase


def test_convert_writes_the_same_codes(model: Path, tmp_path: Path) -> None:
    report = fc.convert(model, tmp_path / "packed")
    layers = [layer for layer in report.layers if layer.phase]
    assert len(layers) == 14
    assert all(layer.bits_per_weight < 1.1 / 2 + 0.2 for layer in layers)
    source, packed = open_source(model), open_source(tmp_path / "packed")
    assert set(packed.layers) == {layer.name for layer in layers}
    for name in packed.layers:
        one, other = packed.phase(name, packed.quant), source.phase(name, packed.quant)
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.scales, other.scales)
    for name in source.names():
        if name.removesuffix(".weight") not in packed.layers:
            np.testing.assert_array_equal(packed.dense(name), source.dense(name))


def test_exempt_layers_stay_dense(model: Path, tmp_path: Path) -> None:
    quant = fc.QuantConfig(exempt=("*.o_proj",))
    fc.convert(model, tmp_path / "packed", quant=quant)
    source, packed = open_source(model), open_source(tmp_path / "packed")
    name = "layer.0.self_attn.o_proj"
    assert not packed.plan(name, packed.quant).phase
    np.testing.assert_array_equal(packed.dense(f"{name}.weight"), source.dense(f"{name}.weight"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant": fc.QuantConfig(method="alternating")}, "--method alternating"),
        ({"quant": fc.QuantConfig(scale="row")}, "--scale row"),
        ({"quant": fc.QuantConfig(stages_for={"*.o_proj": 3})}, "--layer-quant"),
        ({"bits": 2.2}, "--bits"),
    ],
)
def test_choosing_other_codes_is_refused(model, tmp_path, options, words) -> None:
    with pytest.raises(FairyError, match=words):
        fc.convert(model, tmp_path / "packed", **options)
    assert not (tmp_path / "packed").exists()


def damaged(model: Path, directory: Path, change, **config) -> Path:
    """Return a copy of the model whose tensors went through ``change``."""
    directory.mkdir()
    tensors = load_file(str(model / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(directory / "model.safetensors"))
    table = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(table | config))
    return directory


def poison(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{LAYER}.weight_imag"][3, 5] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_imag"), "no layer.1.mlp.down_proj.weight_imag"),
        (lambda t: t.pop("final_norm.weight_real"), "no final_norm.weight_real"),
        (
            lambda t: t.update({f"{LAYER}.weight_imag": t[f"{LAYER}.weight_imag"][:, 1:].copy()}),
            "must be alike",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "proj" in k], "no complex layer"),
    ],
)
def test_damaged_directories_are_refused(model, tmp_path, change, words) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        open_source(damaged(model, tmp_path / "bad", change))
    assert "\n" not in str(caught.value)


def test_nan_is_found_where_it_is(model: Path, tmp_path: Path) -> None:
    directory = damaged(model, tmp_path / "bad", poison)
    with pytest.raises(FairyError, match=r"down_proj\.weight_imag.*\(3, 5\)"):
        fc.convert(directory, tmp_path / "packed")


def test_marks_of_real_layers_are_refused(model: Path, tmp_path: Path) -> None:
    mark = {
        "quant_method": "fairy2i",
        "latents": True,
        "schema_version": 1,
        "config": fc.QuantConfig("w2").to_json(),
    }
    directory = damaged(model, tmp_path / "bad", lambda t: None, quantization_config=mark)
    with pytest.raises(ModelFileError, match="terms"):
        open_source(directory)
