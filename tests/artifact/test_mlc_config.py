from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairy_compile.artifact import EngineSizes, chat_config, check_chat_config
from fairy_compile.errors import ModelFileError

from .conftest import tiny_tokenizer

SIZES = EngineSizes(vocab_size=40, context_window_size=64, prefill_chunk_size=16, max_batch_size=4)


def build(directory: Path, hf: dict[str, Any] | None = None) -> dict[str, Any]:
    result = chat_config(directory, hf or {}, SIZES, model_type="llama", quantization="fairy-w2")
    assert check_chat_config(result.config) == []
    return result.config


def put(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value))


def test_model_without_any_other_file(tmp_path):
    config = build(tmp_path)
    assert config["tokenizer_files"] == []
    assert config["active_vocab_size"] == config["vocab_size"] == 40
    assert (config["bos_token_id"], config["eos_token_id"], config["temperature"]) == (1, 2, 1.0)
    assert config["conv_template"]["stop_token_ids"] == []


def test_sizes(tmp_path):
    config = build(tmp_path, {"hidden_size": 8, "vocab_size": 39, "context_window_size": 3})
    assert config["model_config"]["hidden_size"] == 8
    for place in (config, config["model_config"]):
        assert place["vocab_size"] == 40
        assert place["context_window_size"] == 64
        assert place["prefill_chunk_size"] == 16
    assert config["model_config"]["max_batch_size"] == 4


def test_generation_config_comes_before_config(tmp_path):
    put(tmp_path, "generation_config.json", {"temperature": 0.6, "top_p": None, "eos_token_id": 9})
    config = build(tmp_path, {"temperature": 0.1, "top_p": 0.9, "bos_token_id": 7})
    assert (config["temperature"], config["top_p"]) == (0.6, 0.9)
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, 9)


@pytest.mark.parametrize("bad", [None, "x", True, -1, [], {}])
def test_unusable_values_count_as_missing(tmp_path, bad):
    put(tmp_path, "generation_config.json", {"eos_token_id": bad})
    config = build(tmp_path, {"pad_token_id": bad, "top_p": bad if bad != -1 else None})
    assert (config["eos_token_id"], config["pad_token_id"], config["top_p"]) == (2, 0, 1.0)


def test_every_end_of_text_id_stops(tmp_path):
    put(tmp_path, "generation_config.json", {"eos_token_id": [8, 9]})
    put(tmp_path, "tokenizer.json", tiny_tokenizer())
    put(tmp_path, "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "<s>"})
    config = build(tmp_path, {"eos_token_id": 5})
    assert config["conv_template"]["stop_token_ids"] == [1, 5, 8, 9]
    assert config["eos_token_id"] == [8, 9]
    assert config["bos_token_id"] == 0
    assert config["active_vocab_size"] == 32
    assert config["tokenizer_files"] == ["tokenizer.json", "tokenizer_config.json"]
    assert config["tokenizer_info"]["token_postproc_method"] == "byte_level"


def test_malformed_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="generation_config"):
        build(tmp_path)


def test_written_file_is_the_config(tmp_path):
    result = chat_config(tmp_path, {}, SIZES, model_type="llama", quantization="fairy-w2")
    result.write(tmp_path)
    assert json.loads((tmp_path / "mlc-chat-config.json").read_text()) == result.config
    assert result.conv_template_reason == "the model has no chat template"
