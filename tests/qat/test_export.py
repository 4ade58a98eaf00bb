from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fairy_compile as fc
from fairy_compile.frontends import open_source
from fairy_compile.qat import PhaseComplexLinear, phase_layers, rule
from tests.tiny_models import save_tokenizer


def trained(model, tokens, quant, steps=2):
    """Prepare a model and move its weights by a few optimiser steps."""
    fc.qat.prepare(model, quant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def same_phase(one, other):
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.scales, other.scales)


@pytest.mark.parametrize(
    ("family", "dtype", "quant"),
    [
        ("llama", torch.float32, fc.QuantConfig("w2")),
        ("qwen2", torch.float32, fc.QuantConfig("w1", scale="row")),
        ("qwen3", torch.bfloat16, fc.QuantConfig("w3", scale="tile64", exempt=("lm_head",))),
        ("mistral", torch.float32, fc.QuantConfig("w2", stages_for={"lm_head": 3})),
        ("gemma", torch.float32, fc.QuantConfig("w2", exempt=("*.o_proj",))),
        ("gemma2", torch.bfloat16, fc.QuantConfig("w2")),
        ("gemma3", torch.float32, fc.QuantConfig("w2", exempt=("lm_head",))),
        ("phi3", torch.float32, fc.QuantConfig("w2", scale="row")),
    ],
)
def test_packed_latents_and_forward_have_the_same_codes(
    make_model, tokens, tmp_path, family, dtype, quant
):
    model = trained(make_model(family).to(dtype), tokens, quant)
    report = fc.qat.export(model, tmp_path / "ckpt")
    packed, latents = open_source(report.output), open_source(report.latents)
    assert (packed.kind, latents.kind) == ("packed", "huggingface")
    assert latents.latents is not None
    assert set(packed.layers) == set(phase_layers(model))
    assert set(packed.names()) == set(latents.names())
    by_rule = dataclasses.replace(quant, method="phase")
    fc.convert(report.latents, tmp_path / "converted", quant=by_rule)
    converted = open_source(tmp_path / "converted")
    assert set(converted.layers) == set(packed.layers)
    for name, layer in phase_layers(model).items():
        stored = packed.phase(name, quant)
        same_phase(stored, latents.phase(name, quant))
        same_phase(stored, converted.phase(name, quant))
        # What the forward pass computed with, out of PyTorch.
        for k, pair in enumerate(rule.to_widely_linear(layer.weight.detach().float())):
            codes, scales = rule.codes_and_scales(*pair, layer.stages, layer.scale, 1e-6)
            np.testing.assert_array_equal(stored.unpack()[:, k], codes.numpy())
            np.testing.assert_array_equal(stored.scales[:, k], scales.numpy())
    for name in packed.names():
        if name.removesuffix(".weight") not in packed.layers:
            np.testing.assert_array_equal(packed.dense(name), latents.dense(name))


def test_exporting_an_export_changes_nothing(make_model, tokens, tmp_path):
    save_tokenizer(tmp_path)
    quant = fc.QuantConfig("w2", scale="row")
    model = trained(make_model("qwen2"), tokens, quant)
    fc.qat.export(model, tmp_path / "one", tokenizer=tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "latents")
    fc.qat.prepare(again, quant)
    fc.qat.export(again, tmp_path / "two", tokenizer=tmp_path / "one" / "latents")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_head_that_stays_tied_is_stored_once(make_model, tokens, tmp_path):
    model = trained(make_model("qwen2"), tokens, fc.QuantConfig("w2", exempt=("lm_head",)))
    report = fc.qat.export(model, tmp_path / "ckpt")
    for path in (report.output, report.latents):
        source = open_source(path)
        assert source.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        np.testing.assert_array_equal(
            source.dense("lm_head.weight"), model.lm_head.weight.detach().numpy()
        )


def test_config_marks_the_latents_and_the_tokenizer_comes_along(make_model, tokens, tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|end|>"
    )
    model = trained(make_model(), tokens, "w1", steps=0)
    fc.qat.export(model, tmp_path / "ckpt", tokenizer=tokenizer)
    mark = json.loads((tmp_path / "ckpt/latents/config.json").read_text())["quantization_config"]
    assert (mark["quant_method"], mark["latents"]) == ("fairy2i", True)
    assert mark["config"] == fc.QuantConfig("w1", method="phase").to_json()
    for folder in ("ckpt", "ckpt/latents"):
        assert (tmp_path / folder / "tokenizer.json").is_file()
        assert (tmp_path / folder / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("gemma3", marks=pytest.mark.slow),
    ],
)
def test_compiled_logits_equal_the_models(make_model, tokens, tmp_path, family):
    model = trained(make_model(family), tokens, "w2")
    fc.qat.export(model, tmp_path / "ckpt")
    with torch.no_grad():
        want = model(input_ids=tokens[:1]).logits[0].numpy()
    save_tokenizer(tmp_path / "ckpt")
    fc.build(tmp_path / "ckpt", output=tmp_path / "out", act="float", context=64, prefill_chunk=16)
    with fc.load(tmp_path / "out") as compiled:
        seen = compiled.logits(tokens[0].tolist())
    assert np.linalg.norm(seen - want) <= 1e-4 * np.linalg.norm(want)


def test_output_exists(make_model, tokens, tmp_path):
    model = trained(make_model(), tokens, "w2", steps=0)
    fc.qat.export(model, tmp_path / "ckpt")
    with pytest.raises(fc.FairyError, match="--force"):
        fc.qat.export(model, tmp_path / "ckpt")
    fc.qat.export(model, tmp_path / "ckpt", force=True)


def test_unprepared_and_foreign_models_are_refused(make_model, tmp_path):
    with pytest.raises(fc.FairyError, match=r"fc\.qat\.prepare"):
        fc.qat.export(make_model(), tmp_path / "ckpt")
    module = nn.Sequential(nn.Linear(4, 4))
    fc.qat.prepare(module, "w2")
    with pytest.raises(fc.UnsupportedError, match="transformers"):
        fc.qat.export(module, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_shards_are_refused(make_model, tokens, tmp_path):
    from torch import distributed
    from torch.distributed.tensor import init_device_mesh

    model = trained(make_model(), tokens, "w2", steps=0)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        distributed.fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(fc.FairyError, match="state_dict"):
            fc.qat.export(model, tmp_path / "ckpt")
    finally:
        distributed.destroy_process_group()


def test_nan_and_baked_weights_are_refused(make_model, tokens, tmp_path):
    model = trained(make_model(), tokens, "w2", steps=0)
    layer = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        before = layer.weight.clone()
        layer.weight[3, 5] = float("nan")
        with pytest.raises(fc.FairyError, match=r"layers\.1\.mlp\.down_proj.*\(3, 5\)"):
            fc.qat.export(model, tmp_path / "ckpt")
        layer.weight.copy_(before)
        layer.weight.copy_(layer.quantized_weight())
    with pytest.raises(fc.FairyError, match="holds phase values"):
        fc.qat.export(model, tmp_path / "ckpt")
    again = make_model()
    again.load_state_dict(model.state_dict())
    report = fc.qat.prepare(again, "w2")
    assert any("down_proj holds phase values already" in note for note in report.notes)


def test_complex_layer_exports_its_term(make_model, tokens, tmp_path):
    """A natively complex layer inside an exportable model is written with the W term alone."""
    model = make_model()
    model.extra = fc.qat.ComplexLinear(6, 10)
    fc.qat.prepare(model, fc.QuantConfig("w1", terms=("W",)))
    assert isinstance(model.extra, PhaseComplexLinear)
    fc.qat.export(model, tmp_path / "ckpt")
    packed = open_source(tmp_path / "ckpt")
    stored = packed.phase("extra", fc.QuantConfig("w1"))
    assert stored.terms == ("W",)
    same_phase(stored, model.extra.phase_tensor())


@pytest.mark.parametrize("tokenizer", ["nowhere", 3, b"x"])
def test_what_is_no_tokenizer_is_refused(make_model, tokens, tmp_path, tokenizer):
    model = trained(make_model(), tokens, "w1", steps=0)
    with pytest.raises(fc.FairyError, match=r"holds no tokenizer|tokenizer is .*; allowed"):
        fc.qat.export(model, tmp_path / "ckpt", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_missing_or_not_finite_are_told(make_model, tokens, tmp_path):
    model = trained(make_model(), tokens, "w1", steps=0)
    weights = dict(model.state_dict())
    del weights["lm_head.weight"]
    with pytest.raises(fc.FairyError, match=r"state_dict lacks lm_head\.weight"):
        fc.qat.export(model, tmp_path / "ckpt", state_dict=weights)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(fc.FairyError, match=r"model\.norm\.weight holds 1 non-finite"):
        fc.qat.export(model, tmp_path / "ckpt")
    assert not list(tmp_path.iterdir())
