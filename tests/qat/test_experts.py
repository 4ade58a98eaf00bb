"""Experts in training against the same model with the experts' dequantised matrices."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

import fairy_compile as fc
from fairy_compile.errors import FairyError
from fairy_compile.frontends import open_source
from fairy_compile.train.models import load_model
from tests.tiny_models import SIZES, save_model

FAMILIES = ("mixtral", "qwen3_moe")
# One expert a projection, as checkpoints name them.
DOWN = {"mixtral": "*.experts.*.w2", "qwen3_moe": "*.experts.*.down_proj"}
UP = {"mixtral": "*.experts.*.w3", "qwen3_moe": "*.experts.*.up_proj"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixtures")
    return {family: save_model(place / family, family) for family in FAMILIES}


def with_values(packed, place):
    """Return the model of a packed checkpoint, its values as ordinary weights."""
    source = open_source(packed)
    place.mkdir()
    weights = {n: np.ascontiguousarray(source.dense(n), np.float32) for n in source.names()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(packed / "latents" / "config.json", place / "config.json")
    return load_model(place).train()


def quants(family):
    return [
        fc.QuantConfig("w2"),
        fc.QuantConfig("w1", scale="row", exempt=("lm_head",)),
        fc.QuantConfig("w2", exempt=(DOWN[family],)),
        fc.QuantConfig("w2", stages_for={UP[family]: 3}, exempt=("*.self_attn.*",)),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_outputs_and_gradients(checkpoints, tokens, tmp_path, family, which):
    quant = quants(family)[which]
    model = load_model(checkpoints[family]).train()
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    report = fc.qat.prepare(model, quant)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameters
    exported = fc.qat.export(model, tmp_path / "ckpt")
    packed, latents = open_source(exported.output), open_source(exported.latents)
    assert set(packed.names()) == set(latents.names())
    assert len(packed.layers) == exported.layers
    told = {layer.name for layer in report.phase if "*" in layer.name}
    assert told == {name for name in told if name.replace("*", "0") in packed.layers}
    for name in packed.layers:
        ours, theirs = (s.phase(name, latents.trained) for s in (packed, latents))
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.scales, theirs.scales)

    reference = with_values(exported.output, tmp_path / "values")
    results = []
    for each in (model, reference):
        logits = each(input_ids=tokens, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in each.named_parameters()}))
    (logits, gradients), (want, exact) = results
    assert torch.equal(logits, want)
    for name, gradient in exact.items():  # straight-through: those of the values
        assert torch.equal(gradients[name], gradient), name
    with fc.qat.frozen(model):
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, want)
    assert all("gate_up_proj" not in vars(m) for m in model.modules())


def test_experts_of_one_layer_are_treated_alike(checkpoints):
    model = load_model(checkpoints["mixtral"])
    quant = fc.QuantConfig("w2", stages_for={"*.experts.1.w1": 3})
    with pytest.raises(FairyError, match=r"experts\.\*\.w1 differently"):
        fc.qat.prepare(model, quant)
    assert not fc.qat.phase_layers(model)


def test_other_mixtures_are_refused_by_name():
    config = transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
    model = transformers.OlmoeForCausalLM(config)
    with pytest.raises(FairyError, match=r"experts of a olmoe model .* mixtral, qwen3_moe"):
        fc.qat.prepare(model, "w2")


def test_a_prepared_mixture_is_not_prepared_again(checkpoints):
    model = load_model(checkpoints["qwen3_moe"])
    fc.qat.prepare(model, fc.QuantConfig("w2"))
    with pytest.raises(FairyError, match="once"):
        fc.qat.prepare(model, fc.QuantConfig("w2"))


def test_phase_values_are_no_master_weights(checkpoints, tmp_path):
    model = load_model(checkpoints["mixtral"])
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        value = fc.quantize(experts.down_proj[2], "w2").dequantize()
        experts.down_proj[2] = torch.from_numpy(value)
    fc.qat.prepare(model, fc.QuantConfig("w2"))
    with pytest.raises(FairyError, match=r"experts\.2\.w2 holds phase values"):
        fc.qat.export(model, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
