"""Fairy2i's GGUF files: the numbers they stand for, and what is wrong with those refused."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fairy_compile as fc
from fairy_compile.errors import FairyError
from fairy_compile.evaluation.torch_model import source_model
from fairy_compile.frontends import gguf, open_source
from fairy_compile.frontends.gguf_file import GgufFile
from tests.tiny_gguf import F32, Fairy2i
from tests.tiny_models import relative_error, save_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 256, 40).tolist()
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_padded": {"pad": 64},
    "llama_bundle": {"bundle": True},
    "qwen2": {"base": "qwen2"},
    "qwen2_bundle": {"base": "qwen2", "bundle": True, "coded_head": True},
    "qwen2_merged": {"base": "qwen2", "bundle": True, "merged": True, "scale_dtype": "bfloat16"},
    "qwen2_head": {"base": "qwen2", "coded_head": True},
    "qwen3_w1": {"base": "qwen3", "stages": 1},
    "qwen3_w1_merged": {"base": "qwen3", "stages": 1, "bundle": True, "merged": True},
}


def _model(name: str) -> Fairy2i:
    options = dict(MODELS[name])
    if "scale_dtype" in options:
        options["scale_dtype"] = ml_dtypes.bfloat16
    return Fairy2i(**options)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_codes(name: str, tmp_path: Path) -> None:
    model = _model(name)
    source = open_source(model.save(tmp_path / "model.gguf"))
    want = model.dense | {f"{layer}.weight": a for layer, a in model.matrices.items()}
    assert set(source.names()) == set(want)
    for tensor in source.names():
        seen = source.dense(tensor)
        assert source.shape(tensor) == seen.shape == want[tensor].shape
        assert source.dtype(tensor) == seen.dtype.name
        # Scales of zero become 1e-6, of which an entry sums four.
        np.testing.assert_allclose(
            seen.astype(np.float64), want[tensor].astype(np.float64), rtol=1e-6, atol=4e-6
        )


@pytest.mark.parametrize("name", ["llama_padded", "qwen2_merged", "qwen3_w1"])
def test_logits_equal_pytorch(name: str, tmp_path: Path) -> None:
    model = _model(name)
    path = model.save(tmp_path / "model.gguf")
    save_tokenizer(tmp_path)
    report = fc.build(path, act="float", output=tmp_path / "out", context=64)
    assert report.model == "model.gguf"
    want = model.torch_model()(torch.tensor([TOKENS])).logits[0].detach().numpy()
    with fc.load(tmp_path / "out") as built:
        assert relative_error(built.logits(TOKENS), want) <= 1e-4
    fc.verify(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "fairy.json").read_text())
    assert manifest["source"]["kind"] == "gguf"
    assert "model.gguf" in manifest["source"]["files"]


def test_the_report_says_where_codes_are_from(tmp_path: Path) -> None:
    path = Fairy2i().save(tmp_path / "model.gguf")
    report = fc.build(path, dry_run=True)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["model.layers.0.mlp.down_proj"].stages == 2
    assert layers["lm_head"].reason == "stored dense in the file"
    assert any("a GGUF file of a Fairy2i model: T = 2" in note for note in report.notes)
    quant = fc.QuantConfig(stages_for={"lm_head": 3})
    layers = {layer.name: layer for layer in fc.build(path, quant=quant, dry_run=True).layers}
    assert layers["lm_head"].stages == 3


def test_convert_writes_the_same_codes(tmp_path: Path) -> None:
    path = Fairy2i(base="qwen3", stages=1).save(tmp_path / "model.gguf")
    fc.convert(path, tmp_path / "packed")
    source, packed = open_source(path), open_source(tmp_path / "packed")
    assert set(packed.layers) == set(source.layers)
    for layer in packed.layers:
        assert packed.phase(layer, packed.quant) == source.phase(layer, packed.quant)
    for name in source.names():
        if name.removesuffix(".weight") not in packed.layers:
            np.testing.assert_array_equal(packed.dense(name), source.dense(name))


def test_pytorch_runs_the_file(tmp_path: Path) -> None:
    model = Fairy2i(base="qwen2")
    source = open_source(model.save(tmp_path / "model.gguf"))
    tokens = torch.tensor([TOKENS])
    seen, want = (m(tokens).logits.detach() for m in (source_model(source), model.torch_model()))
    assert relative_error(seen.numpy(), want.numpy()) <= 1e-5


def test_rope_of_long_models(tmp_path: Path) -> None:
    scaling = {
        "fairy2i.rope.scaling.type": "yarn",
        "fairy2i.rope.scaling.factor": 4.0,
        "fairy2i.rope.scaling.original_context_length": 64,
        "fairy2i.rope.scaling.yarn_beta_fast": 16.0,
    }
    source = open_source(Fairy2i().save(tmp_path / "a.gguf", **scaling))
    rope = source.config["rope_scaling"]
    assert rope["attention_factor"] == pytest.approx(1 + 0.1 * np.log(4))
    assert (rope["rope_type"], rope["factor"], rope["beta_fast"]) == ("yarn", 4.0, 16.0)
    given = scaling | {"fairy2i.rope.scaling.attn_factor": 0.5}
    source = open_source(Fairy2i().save(tmp_path / "b.gguf", **given))
    half = source.config["rope_scaling"]["attention_factor"]
    assert half == pytest.approx(rope["attention_factor"] / 2)


def test_numbers_of_float32_have_their_digits(tmp_path: Path) -> None:
    source = open_source(Fairy2i().save(tmp_path / "model.gguf"))
    assert source.config["rms_norm_eps"] == 1e-5


def test_temporary_files_go_with_the_source(tmp_path: Path) -> None:
    source = open_source(Fairy2i().save(tmp_path / "model.gguf"))
    directory = source.directory
    assert json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del source
    assert not directory.exists()


def test_temporary_files_go_where_the_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    changes = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "a"]}
    path = Fairy2i().save(tmp_path / "model.gguf", **changes)
    with pytest.raises(FairyError, match="same token twice"):
        open_source(path)
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "llama"}, "read of Fairy2i models alone"),
        ({"fairy2i.schema_version": 9}, "schema_version = 9; allowed: 1, 2, 3"),
        ({"fairy2i.base_arch": "gemma"}, "base_arch = 'gemma'; allowed: 'llama', 'qwen2'"),
        ({"fairy2i.quant.residual_steps": 1}, "residual_steps = 1; allowed: 2"),
        ({"fairy2i.quant.codebook": "{0}"}, "codebook"),
        (
            {"fairy2i.attn.layout": "qwen2_real"},
            "attn.layout = 'qwen2_real'; allowed: 'llama_real'",
        ),
        ({"fairy2i.weight.layout": "bundle_m64k64_v1"}, "lacks the metadata entry"),
        ({"fairy2i.embedding_length": 64}, "token_embd has the type 0"),
        ({"fairy2i.block_count": 3}, r"lacks the layer blk\.2\.attn_norm"),
        ({"fairy2i.block_count": 1}, r"has the tensor 'blk\.1\.[\w.]*', which no layer"),
        ({"fairy2i.feed_forward_length": 128}, "no tiles of 64x64 for 128 complex columns"),
        ({"fairy2i.attention.head_count": "4"}, "head_count = '4'; allowed: whole numbers from 1"),
        ({"fairy2i.attention.head_count": 0}, "whole numbers from 1"),
        ({"fairy2i.rope.freq_base": -1.0}, "freq_base = -1.0; allowed: positive numbers"),
        ({"fairy2i.rope.scaling.type": "other"}, "scaling.type = 'other'"),
        ({"tokenizer.ggml.eos_token_id": 256}, "eos_token_id = 256; allowed: one of its 256 tok"),
        ({"split.count": 2}, "one of 2 parts of a model"),
        ({"split.count": [1, 2]}, "split.count = array.*; allowed: whole numbers from 0 to"),
        ({"general.architecture": [1, 2]}, r"has the architecture array\(\[1, 2\]"),
        ({"fairy2i.context_length": 1 << 24}, "allowed: whole numbers from 1 to 16777215"),
        ({"fairy2i.attention.head_count_kv": 3}, "head_count = 4 and head_count_kv = 3; the first"),
        ({"fairy2i.attention.head_count": 3}, "3 heads for .* = 128, 256 real numbers"),
        ({"fairy2i.attention.head_count": 1 << 20}, "1048576 heads for .*; allowed: heads that"),
        (
            {"fairy2i.attention.key_length": 64, "fairy2i.rope.dimension_count": 32},
            "key_length = 64, fairy2i.rope.dimension_count = 32; allowed: one size of heads",
        ),
        ({"fairy2i.vocab.original_size": 257}, "original_size = 257 and 256 rows of token_embd"),
        ({"tokenizer.ggml.model": "gpt2"}, "lacks the texts tokenizer.ggml.tokens"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    path = Fairy2i().save(tmp_path / "model.gguf", **changes)
    with pytest.raises(FairyError, match=words):
        open_source(path)


def _drop(name: str):
    return lambda model: model.tensors.pop(name)


def _reshape(name: str, *shape: int):
    def change(model: Fairy2i) -> None:
        kind, _, raw = model.tensors[name]
        model.tensors[name] = kind, shape, raw

    return change


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({}, _drop("blk.0.attn_q.U.s0"), r"has blk.0.attn_q.U.s1, .* ask for blk.0.attn_q.U.s0"),
        ({}, _drop("token_embd"), "lacks the layer token_embd"),
        ({}, _drop("output"), "lacks the layer output"),
        ({}, _drop("blk.1.ffn_norm"), r"lacks the layer blk\.1\.ffn_norm"),
        ({}, _reshape("blk.0.ffn_up.W.s1", 128, 192), r"are no tiles of 64x64"),
        ({}, _reshape("blk.0.ffn_norm"), r"has shape \(1,\); config.json implies \(256,\)"),
        ({}, _reshape("blk.0.ffn_norm", 128), r"has shape \(128,\); config.json implies \(256,\)"),
        ({"bundle": True}, _drop("blk.0.attn_q.bundle.scales"), r"has blk.0.attn_q.bundle.codes"),
        ({"bundle": True}, _reshape("blk.0.attn_q.bundle.codes", 8, 64, 2, 16), "no tiles"),
        (
            {"bundle": True, "merged": True},
            _reshape("blk.0.attn_qkv.bundle.codes", 3, 64, 4, 16),
            "no tiles",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict, change, words: str
) -> None:
    model = Fairy2i(**options)
    change(model)
    path = model.save(tmp_path / "model.gguf")
    with pytest.raises(FairyError, match=words):
        fc.build(path, output=tmp_path / "out")


def test_scales_are_of_tiles_and_finite(tmp_path: Path) -> None:
    model = Fairy2i()
    kind, shape, raw = model.tensors["blk.0.attn_q.U.s0"]
    other = bytearray(raw)
    other[16] ^= 1
    model.tensors["blk.0.attn_q.U.s0"] = kind, shape, bytes(other)
    source = open_source(model.save(tmp_path / "a.gguf"))
    with pytest.raises(FairyError, match=r"scales of blk.0.attn_q.U.s0 differ within a tile"):
        source.dense("model.layers.0.self_attn.q_proj.weight")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, 20).copy()
    rows[:, 17] = 0x7C
    rows[:, 16] = 0
    model.tensors["blk.0.attn_q.U.s0"] = kind, shape, rows.tobytes()
    source = open_source(model.save(tmp_path / "b.gguf"))
    with pytest.raises(FairyError, match=r"scales of blk.0.attn_q are not finite"):
        source.dense("model.layers.0.self_attn.q_proj.weight")


def test_layers_need_the_room_they_take(tmp_path: Path) -> None:
    model = Fairy2i()
    kind, shape, raw = model.tensors["blk.0.attn_q.U.s0"]
    model.tensors["blk.0.attn_q.U.s0"] = kind, shape, raw[: len(raw) // 2]
    source = open_source(model.save(tmp_path / "model.gguf"))
    with pytest.raises(FairyError, match=r"bytes for 'blk.0.attn_q.U.s0', which needs 5120"):
        source.dense("model.layers.0.self_attn.q_proj.weight")


def test_codes_of_another_block_are_refused(tmp_path: Path) -> None:
    """Such as 34 bytes for 32 weights, ggml's type 8, of the same shape."""
    model = Fairy2i(bundle=True)
    name = "blk.0.attn_q.bundle.codes"
    _, shape, raw = model.tensors[name]
    model.tensors[name] = 8, shape, bytes(len(raw) * 34 // 32)
    source = open_source(model.save(tmp_path / "model.gguf"))
    with pytest.raises(FairyError, match=r"has 17408 bytes for .*codes.*, which needs 16384"):
        source.dense("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("bundle", [True, False])
def test_merged_layers_whose_tiles_have_rows_of_two_are_refused(
    tmp_path: Path, bundle: bool
) -> None:
    model = Fairy2i(bundle=bundle, merged=True, kv=1)
    path = model.save(tmp_path / "model.gguf")
    with pytest.raises(FairyError, match=r"holds 128 \+ 32 \+ 32 complex rows .* multiples of 64"):
        open_source(path)


@pytest.mark.parametrize("name", ["output", "output.weight"])
def test_padding_of_the_vocabulary_is_no_token(tmp_path: Path, name: str) -> None:
    model = Fairy2i(pad=64)
    model.tensors[name] = model.tensors.pop("output")
    source = open_source(model.save(tmp_path / "model.gguf"))
    assert source.config["vocab_size"] == 256
    np.testing.assert_array_equal(source.dense("lm_head.weight"), model.dense["lm_head.weight"])


def test_the_embedding_is_read_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Fairy2i(pad=64)
    source = open_source(model.save(tmp_path / "model.gguf"))
    largest = []
    read = GgufFile.read_bytes
    monkeypatch.setattr(
        GgufFile,
        "read_bytes",
        lambda self, name, shape, **how: (
            largest.append(math.prod(shape)) or read(self, name, shape, **how)
        ),
    )
    monkeypatch.setattr(gguf, "_CHUNK", 12_345)
    embedding = source.dense("model.embed_tokens.weight")
    np.testing.assert_array_equal(embedding, model.dense["model.embed_tokens.weight"])
    assert max(largest) <= 12_345


def test_a_head_that_is_there_twice_is_taken_with_its_codes(tmp_path: Path) -> None:
    model = Fairy2i(base="qwen2", coded_head=True)
    dense = np.zeros((model.vocab, 2 * model.width), np.float32)
    model.tensors["output"] = F32, dense.shape, dense.tobytes()
    source = open_source(model.save(tmp_path / "model.gguf"))
    assert np.any(source.dense("lm_head.weight"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rotate": True}, "is a GGUF file of phase codes, and --rotate is for real weights"),
        ({"scale": "row"}, "leave --scale row out"),
        ({"method": "alternating"}, "leave --method alternating out"),
    ],
)
def test_requests_for_other_codes_are_refused(tmp_path: Path, options: dict, words: str) -> None:
    path = Fairy2i().save(tmp_path / "model.gguf")
    with pytest.raises(FairyError, match=words):
        fc.build(path, dry_run=True, **options)


def test_training_wants_master_weights(tmp_path: Path) -> None:
    from fairy_compile.train.models import model_directory

    path = Fairy2i().save(tmp_path / "model.gguf")
    with pytest.raises(FairyError, match="no master weights to train"):
        model_directory(str(path))


def test_missing_files_are_not_looked_for_on_the_hub() -> None:
    with pytest.raises(FairyError, match=r"there is no file /.*/models/x.gguf"):
        open_source("models/x.gguf")
    with pytest.raises(FairyError, match="--revision main goes with"):
        open_source("x.gguf", revision="main")


def test_what_is_no_gguf_file_is_told_from_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FairyError, match="is no regular file, or a link to none"):
        open_source(tmp_path / "link.gguf")
    path = Fairy2i().save(tmp_path / "model")
    with pytest.raises(FairyError, match=r"GGUF file, whose name ends in \.gguf"):
        open_source(path)


@pytest.mark.parametrize("name", ["model.gguf", "tokenizer.json"])
def test_files_that_the_user_may_not_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = Fairy2i().save(tmp_path / "model.gguf")
    save_tokenizer(tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FairyError, match=f"cannot read /.*/{name}: Permission denied"):
        open_source(path)
