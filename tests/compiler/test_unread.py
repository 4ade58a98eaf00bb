"""Tensors that no layer reads: told where they lie beside the model, refused within it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fairy_compile as fc
from fairy_compile.errors import UnsupportedError
from tests.tiny_models import SMALL, save_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "llama", **SMALL)


def _add(model: Path, name: str, tensor: torch.Tensor) -> None:
    path = model / "model.safetensors"
    save_file(load_file(path) | {name: tensor}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # attention_bias is false
        "model.layers.0.self_attn.q_norm.weight",  # of another family
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_tensors_that_would_change_answers_are_refused(model: Path, name: str) -> None:
    _add(model, name, torch.ones(32))
    with pytest.raises(UnsupportedError, match=f"{name}', which models of type 'llama' do not"):
        fc.build(model, dry_run=True)


def test_biases_of_zero_are_left_out(model: Path) -> None:
    _add(model, "model.layers.0.self_attn.q_proj.bias", torch.zeros(32))
    assert not [note for note in fc.build(model, dry_run=True).notes if "belong" in note]


def test_computed_buffers_are_left_out(model: Path) -> None:
    _add(model, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    assert not [note for note in fc.build(model, dry_run=True).notes if "belong" in note]


def test_parts_beside_the_model_are_told(model: Path) -> None:
    for i in range(5):
        _add(model, f"vision_tower.layers.{i}.weight", torch.ones(4))
    _add(model, "model.layers.1.mlp.up_proj.weight", torch.ones(48, 32))
    notes = [note for note in fc.build(model, dry_run=True).notes if "belong" in note]
    assert notes == [
        "6 tensors of the checkpoint belong to no layer of the model: "
        "model.layers.1.mlp.up_proj.weight, vision_tower.layers.0.weight, "
        "vision_tower.layers.1.weight, ..."
    ]


def test_one_part_beside_the_model_is_told_as_one(model: Path) -> None:
    _add(model, "visual.weight", torch.ones(4))
    assert (
        "1 tensor of the checkpoint belongs to no layer of the model: visual.weight"
        in fc.build(model, dry_run=True).notes
    )
