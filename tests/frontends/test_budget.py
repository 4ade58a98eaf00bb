"""Choosing T under a budget of bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends import convert, open_source
from fairy_compile.frontends.budget import (
    Group,
    choose_stages,
    group_layers,
    make_groups,
    stored_bits,
    weight_errors,
)
from fairy_compile.phase import quantize

STAGES = (1, 2, 3, 4)


def groups_of(errors):
    return [
        Group((name,), 100, {t: 100 * t for t in STAGES}, dict(zip(STAGES, values, strict=True)))
        for name, values in errors.items()
    ]


def test_takes_the_steps_that_save_most():
    groups = groups_of({"a": (8, 2, 1, 0.9), "b": (4, 3, 2.9, 2.8), "c": (1, 0.3, 0.1, 0)})
    assert choose_stages(groups, 1) == {"a": 1, "b": 1, "c": 1}
    assert choose_stages(groups, 4 / 3) == {"a": 2, "b": 1, "c": 1}
    assert choose_stages(groups, 2.0) == {"a": 3, "b": 2, "c": 1}
    assert choose_stages(groups, 4) == {"a": 4, "b": 4, "c": 4}


def test_is_best_where_errors_are_convex():
    rng = np.random.default_rng(0)
    for _ in range(20):
        errors = {n: rng.random() * 0.3 ** np.arange(4) * 100 for n in "abcd"}
        groups = groups_of(errors)
        chosen = choose_stages(groups, 2.0)
        spent = sum(chosen.values())
        assert spent == 8

        def cost(stages, errors=errors):
            return sum(errors[n][t - 1] for n, t in zip("abcd", stages, strict=True))

        best = min(cost(s) for s in itertools.product(STAGES, repeat=4) if sum(s) <= 8)
        assert cost([chosen[n] for n in "abcd"]) == pytest.approx(best)


@pytest.mark.parametrize("bits", [0.5, 4.5, float("nan"), -1])
def test_impossible_budgets_tell_what_is_possible(bits):
    with pytest.raises(FairyError, match=r"allowed: 1 to 4 bits a weight"):
        choose_stages(groups_of({"a": (4, 3, 2, 1)}), bits)


def test_layers_of_one_call_share_a_stage_count():
    layers = ["m.0.q_proj", "m.0.k_proj", "m.0.v_proj", "m.0.o_proj", "m.0.up_proj", "lm_head"]
    assert group_layers(layers) == [
        ("m.0.q_proj", "m.0.k_proj", "m.0.v_proj"),
        ("m.0.o_proj",),
        ("m.0.up_proj",),
        ("lm_head",),
    ]
    shapes = dict.fromkeys(layers, (8, 8))
    errors = {layer: {t: 1.0 / t for t in STAGES} for layer in layers}
    together = make_groups(shapes, errors, "tensor")[0]
    assert together.errors == {t: pytest.approx(3 / t) for t in STAGES}
    assert together.bits[2] == 3 * stored_bits("x", (8, 8), 2, "tensor")
    errors["m.0.k_proj"] = {3: 1.0}  # pinned by --layer-quant: 3 for all of them
    groups = make_groups(shapes, errors, "tensor")
    assert set(groups[0].errors) == {3}


def test_all_experts_of_a_layer_share_a_stage_count():
    mixtral = [f"m.0.moe.experts.{e}.{part}" for e in range(3) for part in ("w1", "w2", "w3")]
    gate_up, down = group_layers(mixtral)
    assert set(gate_up) | set(down) == set(mixtral)
    assert all(layer.endswith("w2") for layer in down)
    qwen = [f"m.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(11)]
    assert [len(group) for group in group_layers(qwen)] == [11, 11]


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_weight_errors(scale):
    weight = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    got = weight_errors(weight, STAGES, scale, "alternating")
    for t in STAGES:
        near = quantize(weight, t, scale=scale, method="alternating").dequantize()
        want = np.square(near - weight).sum() / np.square(weight).sum() * weight.size
        assert got[t] == pytest.approx(want, rel=0.1)


def test_convert_without_text(make_model, tmp_path, tensors):
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"):
        shape = (128, 64)
        tensors[f"{name}.weight"] = np.random.default_rng(1).standard_normal(shape).astype("f4")
    model = make_model(tensors)
    report = convert(model, tmp_path / "p", bits=2.4, quant=QuantConfig(exempt=("*odd*",)))
    coded = [layer for layer in report.layers if layer.phase]
    weights = sum(np.prod(layer.shape) for layer in coded)
    assert min(layer.stages for layer in coded) == 2
    assert 2 < sum(8 * layer.nbytes for layer in coded) / weights <= 2.4
    assert {layer.name: layer.stages for layer in coded}["lm_head"] >= 3
    assert "budget of 2.4 bits" in coded[0].reason
    source = open_source(tmp_path / "p")
    for layer in coded:
        assert source.plan(layer.name, source.quant).stages == layer.stages


def test_pinned_layers_keep_their_stages(make_model, tmp_path):
    quant = QuantConfig(stages_for={"lm_head": 1})
    report = convert(make_model(), tmp_path / "p", bits=3.5, quant=quant)
    assert {layer.name: layer.stages for layer in report.layers}["lm_head"] == 1


def test_refusals(make_model, tmp_path):
    model = make_model()
    with pytest.raises(FairyError, match=r"--bits 9 is outside .* allowed: "):
        convert(model, tmp_path / "p", bits=9)
    with pytest.raises(FairyError, match="dry run"):
        convert(model, tmp_path / "p", bits=2.5, dry_run=True)
    latents = make_model(None, "Fairy2i-W2")
    with pytest.raises(FairyError, match="--bits does not go with master weights"):
        convert(latents, tmp_path / "p", bits=2.5)
    assert not (tmp_path / "p").exists()
