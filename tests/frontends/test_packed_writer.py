"""Writing packed checkpoints: shards, and nothing left where writing failed."""

import shutil

import numpy as np
import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends import PackedWriter, open_source, write_packed
from fairy_compile.frontends.packed import PackedLayer
from fairy_compile.phase import quantize

QUANT = QuantConfig()
LAYERS = {
    f"layer{i}": quantize(np.random.default_rng(i).standard_normal((16, 16)), 2) for i in range(4)
}
DENSE = {"norm.weight": np.ones(8, np.float32)}


def test_shards_come_back(tmp_path):
    table = {name: PackedLayer.of(tensor) for name, tensor in LAYERS.items()}
    shapes = {name: (array.dtype.name, array.shape) for name, array in DENSE.items()}
    with PackedWriter(
        tmp_path, {}, quant=QUANT, layers=table, dense=shapes, shard_bytes=150
    ) as writer:
        for name in reversed(LAYERS):
            writer.add_layer(name, LAYERS[name])
        writer.add_dense("norm.weight", DENSE["norm.weight"])
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    source = open_source(tmp_path)
    for name, tensor in LAYERS.items():
        np.testing.assert_array_equal(source.phase(name, QUANT).codes, tensor.codes)
        np.testing.assert_array_equal(source.phase(name, QUANT).scales, tensor.scales)
    np.testing.assert_array_equal(source.dense("norm.weight"), DENSE["norm.weight"])


def test_shards_of_two_checkpoints_do_not_mix(tmp_path):
    table = {name: PackedLayer.of(tensor) for name, tensor in LAYERS.items()}
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        with PackedWriter(
            tmp_path / run, {}, quant=QUANT, layers=table, dense={}, source_sha256={"x": run},
            shard_bytes=150,
        ) as writer:  # fmt: skip
            for name, tensor in LAYERS.items():
                writer.add_layer(name, tensor)
    shard = sorted((tmp_path / "a").glob("model-00002*"))[0]
    shutil.copyfile(tmp_path / "b" / shard.name, shard)
    with pytest.raises(ModelFileError, match="describe different packed checkpoints"):
        open_source(tmp_path / "a")


def test_a_tensor_that_was_not_announced(tmp_path):
    writer = PackedWriter(tmp_path, {}, quant=QUANT, layers={}, dense={"a": ("float32", (2,))})
    with pytest.raises(ValueError, match="b was not announced"):
        writer.add_dense("b", np.ones(2, np.float32))


def test_tokenizer_files_are_copied(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"x": 1}')
    write_packed(
        tmp_path / "p",
        {},
        LAYERS,
        DENSE,
        quant=QUANT,
        tokenizer_files=[tmp_path / "tokenizer.json"],
    )
    assert (tmp_path / "p" / "tokenizer.json").read_text() == '{"x": 1}'
    assert [p.name for p in open_source(tmp_path / "p").tokenizer_files()] == ["tokenizer.json"]


def test_existing_output_is_kept_unless_forced(tmp_path):
    output = tmp_path / "p"
    write_packed(output, {}, LAYERS, DENSE, quant=QUANT)
    with pytest.raises(FairyError, match="not empty"):
        write_packed(output, {}, {}, DENSE, quant=QUANT)
    assert len(open_source(output).names()) == 5
    write_packed(output, {}, {}, DENSE, quant=QUANT, force=True)
    assert open_source(output).names() == ["norm.weight"]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FairyError, match="free"):
        write_packed(tmp_path / "p", {}, LAYERS, DENSE, quant=QUANT)
    assert list(tmp_path.iterdir()) == []


def test_too_many_layers_for_config_json(tmp_path):
    layer = PackedLayer.of(LAYERS["layer0"])
    layers = {f"model.layers.{i}.mlp.experts.proj": layer for i in range(10_000)}
    with pytest.raises(ModelFileError, match="allowed: 1048576"):
        PackedWriter(tmp_path, {}, quant=QUANT, layers=layers, dense={})
