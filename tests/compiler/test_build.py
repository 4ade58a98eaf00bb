"""`build`: what it writes, what it reports, and every way it refuses."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fairy_compile as fc
from fairy_compile.artifact import Manifest
from fairy_compile.errors import FairyError
from tests.tiny_models import SMALL, save_model

ENTRY_POINTS = (
    "_metadata",
    "embed",
    "prefill",
    "batch_prefill",
    "decode",
    "batch_decode",
    "create_tir_paged_kv_cache",
    "alloc_embedding_tensor",
    "softmax_with_temperature",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "apply_bitmask_inplace",
)

OPTIONS = {"target": "cpu", "act": "float", "context": 64, "prefill_chunk": 16}


def build(model: Path, output: Path, **options):
    return fc.build(model, output=output, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def artifact(model_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "artifact"
    build(model_once, out)
    return out


def test_artifact_passes_verify(artifact: Path) -> None:
    report = fc.verify(artifact)
    assert not report.warnings


def test_an_option_that_load_does_not_know_is_told(artifact: Path) -> None:
    with pytest.raises(fc.FairyError, match=r"unknown option 'contxt' of load.* mean context"):
        fc.load(artifact, contxt=64)


def test_library_has_exactly_the_functions_of_the_contract(artifact: Path) -> None:
    """The twelve names an MLC engine needs on a CPU, all found the way the engine finds them."""
    import tvm
    from tvm import relax

    manifest = Manifest.load(artifact)
    assert set(manifest.functions) == set(ENTRY_POINTS)
    library = tvm.runtime.load_module(str(artifact / manifest.library))
    machine = relax.VirtualMachine(library, tvm.cpu())
    for name in ENTRY_POINTS:
        if name.startswith("apply_"):
            assert library.get_function(name, query_imports=True) is not None
        else:
            assert machine.module.implements_function(name)
    assert json.loads(machine["_metadata"]()) == manifest.metadata


def test_metadata_lists_the_parameters_in_order(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    cache = json.loads((artifact / "tensor-cache.json").read_text())
    stored = {r["name"]: r for shard in cache["records"] for r in shard["records"]}
    assert [p["name"] for p in manifest.metadata["params"]] == [p.name for p in manifest.params]
    for param in manifest.metadata["params"]:
        assert stored[param["name"]]["shape"] == param["shape"]
        assert stored[param["name"]]["dtype"] == param["dtype"]
        assert stored[param["name"]]["format"] == "raw"


def test_kv_cache_size_list_has_five_entries(model: Path, tmp_path: Path) -> None:
    """Runtimes before 0.27 refuse a sixth entry."""
    build(model, tmp_path / "out", debug_dump=tmp_path / "dump")
    text = (tmp_path / "dump" / "00-input.py").read_text()
    sizes = text.split('"vm.builtin.paged_attention_kv_cache_create", R.shape(')[1].split("]")[0]
    assert len(ast.parse(f"{sizes}]", mode="eval").body.elts) == 5
    assert len(list((tmp_path / "dump").glob("*.py"))) == 6


def test_report_gives_kernel_layout_bytes_and_reason_of_every_call(
    model: Path, tmp_path: Path
) -> None:
    report = build(model, tmp_path / "out", dry_run=True)
    assert [row.name.split(".")[-1] for row in report.layers] == [
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head",
    ]  # fmt: skip
    assert all(row.kernel and row.layout and row.bytes and row.reason for row in report.layers)
    assert "int8" in report.layers[0].reason  # why not the int8 kernel
    assert not (tmp_path / "out").exists()


def test_one_exempt_pattern_needs_no_list(model: Path, tmp_path: Path) -> None:
    report = build(model, tmp_path / "out", dry_run=True, exempt="lm_head")
    assert [row.name for row in report.layers if not row.stages] == ["lm_head"]


def test_packed_checkpoint_gives_the_same_parameters(model: Path, tmp_path: Path) -> None:
    fc.convert(model, tmp_path / "packed", quant="w2")
    build(tmp_path / "packed", tmp_path / "a")
    build(model, tmp_path / "b")
    hashes = [
        {n: f.sha256 for n, f in Manifest.load(tmp_path / d).files.items() if "shard" in n}
        for d in "ab"
    ]
    assert hashes[0] == hashes[1]


def test_packed_checkpoint_keeps_its_own_quantisation(model: Path, tmp_path: Path) -> None:
    fc.convert(model, tmp_path / "packed", quant="w1")
    report = build(tmp_path / "packed", tmp_path / "out", quant="w3")
    assert {row.stages for row in report.layers} == {1}
    assert any("packed" in note for note in report.notes)
    assert Manifest.load(tmp_path / "out").quant["quant"] == "w1"


def test_hub_models_are_known_by_their_id(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = importlib.import_module("fairy_compile.frontends.source").open_source(model)
    module = importlib.import_module("fairy_compile.compiler.build")
    monkeypatch.setattr(module, "open_source", lambda _: opened)
    assert build("org/name", tmp_path / "out", dry_run=True).model == "org/name"


def test_two_models_of_one_path_do_not_share_a_library(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(model, out)
    with fc.load(out) as first:
        before = first.logits([1, 2, 3])
        build(model, out, quant="w1", force=True)
        with fc.load(out) as second:
            after = second.logits([1, 2, 3])
        np.testing.assert_array_equal(first.logits([1, 2, 3]), before)
    assert np.abs(after - before).max() > 1e-3


def edit_config(model: Path, **changes) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def unknown_architecture(model: Path) -> None:
    edit_config(model, model_type="lama")


def unsupported_rope(model: Path) -> None:
    edit_config(model, rope_parameters={"rope_type": "ntk", "factor": 2.0})


def nan_weights(model: Path) -> None:
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan

    edit_weights(model, change)


def wrong_dtype(model: Path) -> None:
    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    edit_weights(model, change)


def missing_tensor(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def wrong_shape(model: Path) -> None:
    edit_config(model, intermediate_size=64)


def bad_heads(model: Path) -> None:
    edit_config(model, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (no_weights, {}, ["safetensors"]),
        (truncated, {}, ["model.safetensors"]),
        (corrupt_header, {}, ["model.safetensors"]),
        (unknown_architecture, {}, ["'lama'", "llama", "mistral", "qwen2", "qwen3"]),
        (unsupported_rope, {}, ["'ntk'", "default", "linear", "llama3", "yarn"]),
        (nan_weights, {}, ["up_proj", "non-finite", "(3, 5)"]),
        (wrong_dtype, {}, ["up_proj", "int8", "float16"]),
        (missing_tensor, {}, ["up_proj.weight"]),
        (wrong_shape, {}, ["gate_proj.weight", "(48, 32)", "(64, 32)"]),
        (bad_heads, {}, ["4", "3"]),
        (None, {"target": "metl"}, ["'metl'", "cpu"]),
        (None, {"target": "x86"}, ["x86-64-v3"]),
        (None, {"quant": "w9"}, ["'w9'", "w1, w2, w3, w4"]),
        (None, {"act": "int4"}, ["'int4'", "int8"]),
        (None, {"context": 10**6}, ["1000000", "256"]),
        (None, {"context": 0}, ["--context", "0"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    model: Path, tmp_path: Path, damage, options, words: list[str]
) -> None:
    if damage:
        damage(model)
    out = tmp_path / "deep" / "out"
    with pytest.raises(fc.FairyError) as error:
        build(model, out, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(fc.FairyError, match="nowhere"):
        build(tmp_path / "nowhere", tmp_path / "out")


def test_non_empty_output_is_left_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(fc.FairyError):
            build(model, out, force=force)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_full_disk_is_noticed_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(fc.FairyError, match="free"):
        build(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_build_goes_on_and_gives_the_same_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fairy_compile.artifact.params import ParamWriter

    out = tmp_path / "out"
    add, seen = ParamWriter.add, []

    def add_then_stop(self, name, array):
        add(self, name, array)
        self._close_shard()
        seen.append(name)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ParamWriter, "add", add_then_stop)
    with pytest.raises(KeyboardInterrupt):
        build(model, out)
    assert not out.exists()
    build(model, out)
    assert len(seen) == len(set(seen))  # nothing was written twice
    monkeypatch.undo()
    fc.verify(out)
    build(model, tmp_path / "whole")
    with fc.load(out) as resumed, fc.load(tmp_path / "whole") as whole:
        np.testing.assert_array_equal(resumed.logits([5, 6]), whole.logits([5, 6]))
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_what_is_read_is_not_replaced(tmp_path):
    source = save_model(tmp_path / "model", "llama", **SMALL)
    packed = tmp_path / "packed"
    fc.convert(source, packed)
    with pytest.raises(FairyError, match=r"packed is what it is made from, .* another --output"):
        fc.build(packed, output=packed, force=True)
    # As an export of training has them beside its codes.
    shutil.copytree(source, packed / "latents")
    with pytest.raises(FairyError, match=r"packed holds what it is made from, .*latents, and"):
        fc.convert(packed / "latents", packed, force=True)
    assert (packed / "config.json").is_file()
    assert (packed / "latents" / "model.safetensors").is_file()
