"""`convert`: a Hugging Face directory in, a packed checkpoint or nothing out."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import fairy_compile
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends import convert, open_source
from fairy_compile.frontends.convert import relative_error
from fairy_compile.phase import quantize

from .conftest import DTYPES, tiny_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj"
UP_PROJ = "model.layers.0.mlp.up_proj"
ODD_PROJ = "model.layers.0.mlp.odd_proj"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_codes_equal_direct_quantisation_bit_for_bit(make_model, tmp_path, dtype, scale, shards):
    tensors = tiny_tensors(dtype)
    quant = QuantConfig("w2", method="phase", scale=scale, stages_for={"lm_head": 3})
    convert(make_model(tensors, shards=shards), tmp_path / "p", quant=quant)
    source = open_source(tmp_path / "p")
    assert source.quant == quant
    assert sorted(source.names()) == sorted(tensors)
    for layer in (Q_PROJ, UP_PROJ, "lm_head"):
        got = source.phase(layer, quant)
        want = quantize(tensors[f"{layer}.weight"], quant, name=layer)
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(got.scales, want.scales)
        assert got.stages == (3 if layer == "lm_head" else 2)
    for name, array in tensors.items():
        if name.removesuffix(".weight") not in (Q_PROJ, UP_PROJ, "lm_head"):
            assert source.dtype(name) == array.dtype.name
            np.testing.assert_array_equal(source.dense(name), array)


def test_report(make_model, tmp_path):
    tensors = tiny_tensors()
    model = make_model(tensors)
    seen = []
    report = convert(model, tmp_path / "p", quant="w1", progress=lambda *step: seen.append(step))
    layers = {layer.name: layer for layer in report.layers}
    assert set(layers) == {Q_PROJ, UP_PROJ, ODD_PROJ, "lm_head"}
    assert (layers[ODD_PROJ].phase, layers[ODD_PROJ].reason) == (False, "odd dimension 33")
    assert layers[ODD_PROJ].bits_per_weight == 32
    assert layers[ODD_PROJ].nbytes == 33 * 8 * 4
    tensor = quantize(tensors[f"{UP_PROJ}.weight"], 1)
    assert (layers[UP_PROJ].phase, layers[UP_PROJ].stages) == (True, 1)
    assert layers[UP_PROJ].nbytes == tensor.codes.nbytes + tensor.scales.nbytes
    assert layers[UP_PROJ].bits_per_weight == pytest.approx(tensor.bits_per_weight)
    exact = tensors[f"{UP_PROJ}.weight"].astype(np.float64)
    error = np.square(tensor.dequantize() - exact).sum() / np.square(exact).sum()
    assert layers[UP_PROJ].nmse == pytest.approx(error, rel=1e-5)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    bits = sum(8 * layer.nbytes for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(bits / weights)
    assert report.files == sorted(p.name for p in (tmp_path / "p").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(report.files)
    assert [step[0] for step in seen] == list(tensors)
    assert seen[-1][1:] == (len(tensors) - 1, len(tensors))
    json.dumps(report.to_json())


def test_checkpoint_tells_what_it_was_made_from(make_model, tmp_path):
    model = make_model()
    convert(model, tmp_path / "p")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["hidden_size"] == 8
    assert config["quantization_config"]["source"]["sha256"] == open_source(model).sha256()


def test_dry_run_writes_nothing_and_plans_the_same(make_model, tmp_path):
    model = make_model()
    plan = convert(model, tmp_path / "p", dry_run=True)
    assert not (tmp_path / "p").exists()
    assert (plan.dry_run, plan.files) == (True, [])
    done = convert(model, tmp_path / "p")
    assert plan.nbytes == done.nbytes
    assert plan.layers == [dataclasses.replace(layer, nmse=None) for layer in done.layers]
    assert (tmp_path / "p" / "model.safetensors").stat().st_size >= plan.nbytes


def test_exempt_layers_stay_dense(make_model, tmp_path):
    convert(make_model(), tmp_path / "p", quant=QuantConfig(exempt=("lm_head",)))
    source = open_source(tmp_path / "p")
    assert not source.plan("lm_head", QuantConfig()).phase
    assert source.plan(Q_PROJ, QuantConfig()).phase


def test_scale_overrides_the_config(make_model, tmp_path):
    convert(make_model(), tmp_path / "p", quant=QuantConfig("w1"), scale="row")
    assert open_source(tmp_path / "p").phase(Q_PROJ, QuantConfig()).scale == "row"


def test_dense_dtype_float16(make_model, tmp_path):
    tensors = tiny_tensors(ml_dtypes.bfloat16)
    convert(make_model(tensors), tmp_path / "p", dense_dtype="float16")
    source = open_source(tmp_path / "p")
    name = "model.embed_tokens.weight"
    assert source.dtype(name) == "float16"
    np.testing.assert_array_equal(source.dense(name), tensors[name].astype(np.float16))


def test_dense_dtype_float16_overflow(make_model, tmp_path, tensors):
    tensors["model.embed_tokens.weight"][1, 1] = 1e5
    with pytest.raises(FairyError, match=r"embed_tokens\.weight goes up to 1e\+05"):
        convert(make_model(tensors), tmp_path / "p", dense_dtype="float16")
    assert not (tmp_path / "p").exists()


def test_model_without_lm_head(make_model, tmp_path, tensors):
    del tensors["lm_head.weight"]
    report = convert(make_model(tensors), tmp_path / "p")
    assert "lm_head" not in {layer.name for layer in report.layers}


def test_baked_weights_are_reported(make_model, tmp_path, tensors):
    weight = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    tensors[f"{Q_PROJ}.weight"] = quantize(weight).dequantize()
    report = convert(make_model(tensors), tmp_path / "p")
    layer = next(layer for layer in report.layers if layer.name == Q_PROJ)
    assert layer.reason == "recovered from a weight that holds phase values"
    assert layer.nmse < 1e-10


def test_packed_input_is_refused(make_model, tmp_path):
    convert(make_model(), tmp_path / "p")
    with pytest.raises(FairyError, match="packed checkpoint already"):
        convert(tmp_path / "p", tmp_path / "q")


def test_existing_output_is_refused_without_force(make_model, tmp_path):
    model, output = make_model(), tmp_path / "p"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FairyError, match="not empty"):
        convert(model, output)
    assert [p.name for p in output.iterdir()] == ["notes.txt"]


def test_force_replaces_a_checkpoint(make_model, tmp_path):
    model, output = make_model(), tmp_path / "p"
    convert(model, output, quant="w1")
    convert(model, output, quant="w2", force=True)
    assert open_source(output).quant.quant == "w2"


def test_no_disk_space(make_model, tmp_path, monkeypatch):
    model = make_model()
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for dry_run in (True, False):
        with pytest.raises(FairyError, match="free"):
            convert(model, tmp_path / "p", dry_run=dry_run)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_nan_weights_leave_nothing(make_model, tmp_path, tensors):
    tensors["lm_head.weight"][0, 0] = np.nan
    with pytest.raises(FairyError, match=r"lm_head\.weight holds 1 non-finite"):
        convert(make_model(tensors), tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_interrupt_leaves_nothing(make_model, tmp_path):
    model = make_model()

    def interrupt(name, done, count):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "p", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unknown_options(make_model, tmp_path):
    model = make_model()
    for options in ({"quant": "w7"}, {"scale": "column"}, {"dense_dtype": "int8"}):
        with pytest.raises(FairyError, match="allowed"):
            convert(model, tmp_path / "p", **options)


def test_is_the_public_function():
    assert fairy_compile.convert is convert


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_relative_error_of_large_layers_is_measured_on_a_sample(scale):
    weight = np.random.default_rng(0).standard_normal((2 * 1100, 16)).astype(np.float32)
    tensor = quantize(weight, 1, scale=scale)
    full = np.square(tensor.dequantize() - weight).sum() / np.square(weight).sum()
    assert relative_error(weight, tensor) == pytest.approx(full, rel=0.1)
    assert relative_error(np.zeros((8, 8), np.float32), quantize(np.zeros((8, 8)))) == 0
