"""Fairy2i models whose scales were learned: right, and refused where that cannot be."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fairy_compile as fc
from fairy_compile.errors import FairyError
from fairy_compile.frontends import open_source
from fairy_compile.frontends.learned_scales import SUFFIX, TRAINED, with_learned_scales
from tests.tiny_fairy2i import TILE, by_definition, save_learned, torch_model
from tests.tiny_models import relative_error

LAYER = "model.layers.1.mlp.down_proj"
TOKENS = np.random.default_rng(5).integers(0, 320, 40).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_learned(tmp_path_factory.mktemp("learned") / "model")


def test_logits_are_those_of_the_definition(model: Path, tmp_path: Path) -> None:
    fc.build(model, act="float", output=tmp_path / "out", context=64)
    want = torch_model(model)(torch.tensor([TOKENS])).logits[0].detach().numpy()
    with fc.load(tmp_path / "out") as built:
        assert relative_error(built.logits(TOKENS), want) <= 1e-4


def test_scales_of_zero_are_the_only_ones_to_change(model: Path) -> None:
    source, stored = open_source(model), load_file(model / "model.safetensors")
    quant, _ = source.settle(fc.QuantConfig())
    tensor = source.phase(LAYER, quant)
    scales = stored[LAYER + SUFFIX].float().numpy()
    want = np.where(scales == 0, np.float32(1e-6), abs(scales))
    np.testing.assert_array_equal(tensor.scales[0].reshape(want.shape), want)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_edges_between_axes_are_imaginary(dtype: type) -> None:
    # Values of few bits: a third of the entries lie on an edge, some are zero.
    weight = np.random.default_rng(0).integers(-3, 4, (4 * TILE, 2 * TILE)).astype(dtype)
    scales = np.random.default_rng(1).uniform(0.5, 2, (4, 2, 1)).astype(np.float32)
    tensor = with_learned_scales(weight, scales)
    np.testing.assert_allclose(tensor.dequantize(), by_definition(weight, scales), rtol=1e-6)


def test_bfloat16_weights_are_compared_as_they_were_trained() -> None:
    weight = np.zeros((2 * TILE, 2 * TILE), np.float32)
    # Re U is half of 1 + 2^-8, which bfloat16 rounds to 1, and Im U is half of 1.
    weight[0, 0], weight[TILE, TILE], weight[TILE, 0] = 1.0, 2.0**-8, 1.0
    scales = np.ones((4, 1, 1), np.float32)
    assert with_learned_scales(weight, scales).unpack()[0, 0, 0, 0] == 0
    rounded = with_learned_scales(weight.astype(ml_dtypes.bfloat16), scales)
    assert rounded.unpack()[0, 0, 0, 0] == 1


def test_layers_without_scales_stay_dense_unless_named(model: Path) -> None:
    layers = {layer.name: layer for layer in fc.build(model, dry_run=True).layers}
    assert layers["lm_head"].reason == "the model has no learned scales for it"
    assert layers["lm_head"].stages == 0
    quant = fc.QuantConfig(stages_for={"lm_head": 3})
    layers = {layer.name: layer for layer in fc.build(model, quant=quant, dry_run=True).layers}
    assert layers["lm_head"].stages == 3
    source = open_source(model)
    settled, _ = source.settle(quant)
    head = source.phase("lm_head", settled)
    weight = source.dense("lm_head.weight").astype(np.float32)
    alternating = fc.quantize(weight, 3, scale="tile64", method="alternating")
    np.testing.assert_array_equal(head.codes, alternating.codes)


def test_convert_keeps_codes_and_scales(model: Path, tmp_path: Path) -> None:
    report = fc.convert(model, tmp_path / "packed")
    assert {layer.stages for layer in report.layers if layer.phase} == {1}
    source, packed = open_source(model), open_source(tmp_path / "packed")
    quant, _ = source.settle(fc.QuantConfig())
    assert len(packed.layers) == 14
    assert not [name for name in packed.names() if name.endswith(SUFFIX)]
    for name in packed.layers:
        assert packed.phase(name, quant) == source.phase(name, quant)


def test_exempt_layers_keep_their_master_weights(model: Path) -> None:
    quant = fc.QuantConfig(exempt=("*.down_proj",))
    source = open_source(model)
    settled, _ = source.settle(quant)
    assert not source.plan(LAYER, settled).phase
    with pytest.raises(FairyError, match="exempt by pattern"):
        source.phase(LAYER, settled)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"method": "alternating"}, "--method alternating"),
        ({"scale": "row"}, "--scale row"),
        ({"bits": 2.0}, "--bits"),
        ({"quant": fc.QuantConfig(stages_for={"*.q_proj": 2})}, r"--layer-quant \*.q_proj"),
    ],
)
def test_requests_for_other_codes_are_refused(model: Path, options: dict, flag: str) -> None:
    with pytest.raises(FairyError, match=f"has the codes and scales it was .* leave {flag} out"):
        fc.build(model, dry_run="bits" not in options, output="/nonexistent/x", **options)


def test_rotation_is_refused(model: Path) -> None:
    with pytest.raises(FairyError, match=r"--rotate .* their scales were learned"):
        fc.build(model, rotate=True, dry_run=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({LAYER + SUFFIX: t[LAYER + SUFFIX][:2]}), "expected .4, rows / 128"),
        (lambda t: t.update({LAYER + SUFFIX: t[LAYER + SUFFIX][..., :1]}), "columns / 128"),
        (lambda t: t.update({"x" + SUFFIX: t[LAYER + SUFFIX].clone()}), "no matrix x.weight"),
        (lambda t: t.pop(LAYER + SUFFIX), f"other layers' down_proj and no {LAYER}"),
        (lambda t: t[LAYER + SUFFIX].fill_(float("nan")), "non-finite"),
    ],
)
def test_damaged_scales_are_refused(model: Path, tmp_path: Path, change, words: str) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(FairyError, match=words):
        open_source(tmp_path).phase(LAYER, TRAINED)


def test_training_does_not_drop_the_scales(model: Path) -> None:
    from fairy_compile.train.models import load_model

    with pytest.raises(FairyError, match=r"learned scales .*compare with the packed checkpoint"):
        load_model(model)
