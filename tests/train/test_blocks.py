from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from fairy_compile import FairyError
from fairy_compile import documents as documents_module
from fairy_compile.train.blocks import check_vocabulary, split, write_tokens


def test_documents_are_joined_with_the_end_token(model, tmp_path):
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    (tmp_path / "d.jsonl").write_text('{"text": "def f"}\n{"text": "return"}\n')
    end = tokenizer.token_to_id("<|end|>")
    tokens = write_tokens(tmp_path / "d.jsonl", model, tmp_path / "tokens", eos=end)
    want = [*tokenizer.encode("def f").ids, end, *tokenizer.encode("return").ids, end]
    assert tokens.tolist() == want


def test_tokens_before_a_text_come_once_a_document(model, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "_PIECE_BYTES", 8)
    table = json.loads((model / "tokenizer.json").read_text())
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    (tmp_path / "d.txt").write_text("return 1\nreturn 2\nreturn 3\n")
    tokens = write_tokens(tmp_path / "d.txt", tmp_path, tmp_path / "tokens")
    assert tokens.tolist().count(0) == 1
    assert tokens[0] == 0
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.decode(tokens.tolist()) == "return 1\nreturn 2\nreturn 3\n"


def test_tokens_are_reused_until_the_data_changes(model, tmp_path):
    data, path = tmp_path / "d.txt", tmp_path / "tokens"
    data.write_text("return")
    first = write_tokens(data, model, path)
    stamp = path.stat().st_mtime_ns
    write_tokens(data, model, path)
    assert path.stat().st_mtime_ns == stamp
    data.write_text("return return")
    assert len(write_tokens(data, model, path)) > len(first)


def test_blocks_partition_the_text():
    tokens = np.arange(105, dtype=np.uint32)
    trained, held = split(tokens, 10, 0.2)
    assert (len(trained), len(held)) == (8, 2)
    seen = [
        i for blocks in (trained, held) for j in range(len(blocks)) for i in blocks[j]["input_ids"]
    ]
    assert sorted(map(int, seen)) == list(range(100))
    assert split(tokens, 10, 0.0)[1] is None
    assert len(split(tokens, 10, 1.0)[0]) == 1
    assert split(tokens, 60, 0.5)[1] is None  # a single block


def test_empty_and_short_data(model, tmp_path):
    (tmp_path / "d.txt").write_text("")
    with pytest.raises(FairyError, match="is empty"):
        write_tokens(tmp_path / "d.txt", model, tmp_path / "tokens", eos=0)
    with pytest.raises(FairyError, match="less than one block of 64"):
        split(np.zeros(63, np.uint32), 64, 0.1)


def test_a_tokenizer_that_does_not_fit(model, tmp_path):
    with pytest.raises(FairyError, match=r"ids up to \d+.*vocabulary is 100"):
        check_vocabulary(model, 100)
    with pytest.raises(FairyError, match="has no tokenizer"):
        check_vocabulary(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FairyError, match="not a valid tokenizer"):
        check_vocabulary(tmp_path, 100)
