from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fairy_compile.artifact import copy_tokenizer_files
from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.errors import ModelFileError

LLAMA2 = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "a": 2}},
}
BYTE_LEVEL = {
    "decoder": {"type": "ByteLevel"},
    "pre_tokenizer": {"type": "ByteLevel"},
    "post_processor": {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<b>"}}]},
        ],
    },
    "added_tokens": [{"id": 3, "content": "<b>", "special": True}],
}
METASPACE = {
    "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"},
    "decoder": {"type": "Metaspace", "prepend_scheme": "first"},
    "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]},
}


def read(directory: Path, tokenizer: Any, **config: Any) -> TokenizerFiles:
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerFiles.read(directory)


@pytest.mark.parametrize(
    ("tokenizer", "method", "prepend", "strip"),
    [
        (LLAMA2, "byte_fallback", True, True),
        (BYTE_LEVEL, "byte_level", False, False),
        (METASPACE, "byte_fallback", True, True),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "byte_level", False, False),
        ({}, "byte_fallback", False, False),
        ({"decoder": 3, "normalizer": [], "pre_tokenizer": None}, "byte_fallback", False, False),
    ],
)
def test_tokenizer_info(tmp_path, tokenizer, method, prepend, strip):
    assert read(tmp_path, tokenizer).tokenizer_info() == {
        "token_postproc_method": method,
        "prepend_space_in_encode": prepend,
        "strip_space_in_decode": strip,
    }


def test_prefix_ids(tmp_path):
    assert read(tmp_path, LLAMA2).prefix_ids() == [1]
    assert read(tmp_path, BYTE_LEVEL).prefix_ids() == [3]
    assert read(tmp_path, METASPACE, bos_token="a").prefix_ids() == []
    assert read(tmp_path, METASPACE, bos_token="a", add_bos_token=True).prefix_ids() == [1]


def test_ids_of_special_tokens(tmp_path):
    files = read(tmp_path, LLAMA2, bos_token="<s>", eos_token={"content": "a"}, pad_token=None)
    assert (files.token_id("bos_token"), files.token_id("eos_token")) == (1, 2)
    assert files.token_id("pad_token") is None
    assert files.special_tokens() == {"<s>": 1}


def test_unigram_ids(tmp_path):
    assert read(tmp_path, METASPACE).ids == {"<unk>": 0, "a": 1}


def test_added_token_given_twice(tmp_path):
    token = {"id": 1, "content": "<s>"}
    with pytest.raises(ModelFileError, match="twice"):
        read(tmp_path, {"added_tokens": [token, token]})


@pytest.mark.parametrize("token", [{}, {"content": 1, "id": 1}, {"content": "a", "id": "1"}])
def test_malformed_added_token(tmp_path, token):
    with pytest.raises(ModelFileError, match="expected an object with content and id"):
        read(tmp_path, {"added_tokens": [token]})


def test_model_without_tokenizer(tmp_path):
    files = TokenizerFiles.read(tmp_path)
    assert files.present() == []
    assert files.prefix_ids() == []


def test_copying(tmp_path):
    read(tmp_path, LLAMA2)
    (tmp_path / "to").mkdir()
    names = copy_tokenizer_files([tmp_path / "tokenizer.json"], tmp_path / "to")
    assert names == ["tokenizer.json"]
    assert TokenizerFiles.read(tmp_path / "to").present() == names
