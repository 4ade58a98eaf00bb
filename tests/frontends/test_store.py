"""Tensors over one file or many: indexes that lie, shards that are missing."""

import json

import numpy as np
import pytest

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends.store import TensorStore

from .conftest import safetensors_bytes, write_index


def test_shards_hold_what_one_file_holds(make_model, tensors):
    single = TensorStore.open(make_model(tensors, "single"))
    sharded = TensorStore.open(make_model(tensors, "sharded", shards=3))
    assert sorted(single.infos) == sorted(sharded.infos)
    for name in tensors:
        assert single.info(name).shape == sharded.info(name).shape
        np.testing.assert_array_equal(single.read(name), sharded.read(name))
    assert len(sharded.files) == 4


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x", "..", "sub/x.safetensors"])
def test_index_escapes_the_directory(make_model, tensors, name):
    directory = make_model(tensors, shards=2)
    write_index(directory, {"lm_head.weight": name})
    with pytest.raises(ModelFileError, match="allowed: plain file names"):
        TensorStore.open(directory)


def test_shard_is_a_link_out_of_the_directory(make_model, tensors, tmp_path):
    directory = make_model(tensors, shards=2)
    shard = directory / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="symbolic link"):
        TensorStore.open(directory)


def test_missing_shard(make_model, tensors):
    directory = make_model(tensors, shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match="lacks the shard model-00002-of-00002"):
        TensorStore.open(directory)


def test_truncated_shard(make_model, tensors):
    directory = make_model(tensors, shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"00002-of-00002.*is truncated"):
        TensorStore.open(directory)


def test_tensor_of_the_index_is_absent_from_its_shard(make_model, tensors):
    directory = make_model(tensors, shards=2)
    shard = directory / "model-00001-of-00002.safetensors"
    shard.write_bytes(safetensors_bytes({"other": np.ones(2, np.float32)}))
    with pytest.raises(ModelFileError, match=r"lacks the tensor 'model\.embed_tokens"):
        TensorStore.open(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_a_weight_map(make_model, tensors, index):
    directory = make_model(tensors, shards=2)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="no weight_map"):
        TensorStore.open(directory)


def test_index_names_something_that_is_not_text(make_model, tensors):
    directory = make_model(tensors, shards=2)
    write_index(directory, {"lm_head.weight": 7})
    with pytest.raises(ModelFileError, match="names the file 7"):
        TensorStore.open(directory)


def test_directory_without_weights(tmp_path):
    with pytest.raises(ModelFileError, match=r"no weights: looked for model\.safetensors"):
        TensorStore.open(tmp_path)


def test_unknown_tensor_suggests_names(make_model):
    with pytest.raises(FairyError, match=r"no tensor 'lm_head'.*lm_head\.weight"):
        TensorStore.open(make_model()).info("lm_head")
