from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from fairy_compile.artifact import inspect, render
from fairy_compile.config import QuantConfig
from fairy_compile.errors import ModelFileError
from fairy_compile.phase import quantize


def text_of(inspection) -> str:
    stream = io.StringIO()
    render(inspection, Console(file=stream, width=200, color_system=None))
    return stream.getvalue()


def test_artifact(artifact):
    found = inspect(artifact.directory)
    assert found.kind == "artifact"
    (row,) = found.layers
    assert (row.name, row.kernel, row.shape) == ("layer", "generic", (4, 8))
    assert row.bits_per_weight == 8 * 24 / 32
    assert {file.name for file in found.files} >= {"lib.so", "params_shard_0.bin"}
    assert json.loads(json.dumps(found.to_json()))["layers"][0]["terms"] == "UW"
    text = text_of(found)
    for word in ("llama", "generic", "only kernel", "4x8", "6.00", "lib.so", "cpu (cpu)"):
        assert word in text


def test_names_from_files_cannot_steer_the_terminal(artifact):
    def rename(manifest):
        manifest["layers"][0]["name"] = "\x1b[2J[bold]x[/nope]"

    artifact.edit_manifest(rename)
    text = text_of(inspect(artifact.directory))
    assert "\x1b" not in text
    assert "[bold]x[/nope]" in text


def test_packed_checkpoint(tmp_path):
    from fairy_compile.frontends import write_packed

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    write_packed(
        tmp_path / "ckpt",
        {"model_type": "llama", "vocab_size": 8},
        {"model.layers.0.mlp.up_proj": quantize(weight, "w2")},
        {"model.embed_tokens.weight": np.ones((8, 16), np.float16)},
        quant=QuantConfig("w2"),
    )
    found = inspect(tmp_path / "ckpt")
    assert found.kind == "packed checkpoint"
    rows = {row.name: row for row in found.layers}
    coded = rows["model.layers.0.mlp.up_proj"]
    assert (coded.stages, coded.terms, coded.scale, coded.shape) == (2, "UW", "tensor", (8, 16))
    assert coded.bytes == 2 * 2 * 4 * 2 + 2 * 2 * 2 * 4
    dense = rows["model.embed_tokens"]
    assert (dense.stages, dense.bytes, dense.bits_per_weight) == (0, 256, 16.0)
    assert "up_proj" in text_of(found)


def test_a_gguf_file_is_a_model(tmp_path):
    path = tmp_path / "a model.gguf"
    path.write_bytes(b"GGUF")
    words = r"is a model.*`fairy_compile build '.*a model\.gguf' --dry-run` lists its layers"
    with pytest.raises(ModelFileError, match=words):
        inspect(path)


@pytest.mark.parametrize("config", [None, "{}", '{"quantization_config": []}'])
def test_directory_that_is_neither(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelFileError, match="neither an artifact"):
        inspect(tmp_path)
