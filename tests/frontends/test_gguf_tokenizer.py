"""Tokenizers of GGUF files: the same ids as the tokenizer whose vocabulary the file has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends import open_source
from fairy_compile.frontends.gguf_file import GgufFile
from fairy_compile.frontends.gguf_tokenizer import merges_of_scores, write_tokenizer
from tests.tiny_gguf import Fairy2i, write_gguf

CORPUS = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "The quick brown fox doesn't jump over 1234 lazy dogs; it's 56 times slower.\n\n",
    "Größe, naïve, 東京 and Ωμέγα — the others   came  later.\r\n\t- item 7\n",
] * 4
TEXTS = [
    "Hello world, it's me: 12345 values!\n\n  return x\r\n",
    "naïve Größe 東京 \U0001f9da zzz\t\t.",
    "   leading and trailing   ",
    "<|im_start|>user\nhi<|im_end|>",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


def _qwen2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def _llama() -> Tokenizer:
    """Return a BPE tokenizer as SentencePiece's are converted, tokens by falling score."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _tokens(tokenizer: Tokenizer) -> list[str]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    return [by_id[i] for i in range(len(by_id))]


def _write(path: Path, tokens: list[str], types: list[int], **more: Any) -> Path:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    return write_gguf(path, metadata | {f"tokenizer.{k}": v for k, v in more.items()}, {})


def _rebuilt(path: Path) -> Tokenizer:
    write_tokenizer(GgufFile(path), path.parent)
    return Tokenizer.from_file(str(path.parent / "tokenizer.json"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer, Path]:
    """Return a tokenizer, the one of a GGUF file with its vocabulary, and the directory."""
    tokenizer = _qwen2()
    state = json.loads(tokenizer.to_str())
    tokens = [*_tokens(tokenizer), "[PAD]", "[PAD2]"]
    types = [NORMAL] * (len(tokens) - 4) + [CONTROL] * 2 + [UNUSED] * 2
    directory = tmp_path_factory.mktemp("qwen2")
    path = _write(
        directory / "m.gguf",
        tokens,
        types,
        **{
            "ggml.model": "gpt2",
            "ggml.pre": "qwen2",
            "ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
            "ggml.eos_token_id": tokens.index("<|im_end|>"),
            "ggml.padding_token_id": tokens.index("<|im_start|>"),
            "chat_template": "{{ messages }}",
        },
    )
    return tokenizer, _rebuilt(path), directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer, Path]:
    """Return a tokenizer, the one of a GGUF file with its vocabulary, and the directory."""
    tokenizer = _llama()
    tokens = _tokens(tokenizer)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    types += [NORMAL] * (len(tokens) - len(types))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    rank = {"".join(pair): -float(i) for i, pair in enumerate(merges)}
    path = _write(
        tmp_path_factory.mktemp("llama") / "m.gguf",
        tokens,
        types,
        **{
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.scores": [rank.get(token, -1e6) for token in tokens],
            "ggml.bos_token_id": 1,
            "ggml.eos_token_id": 2,
            "ggml.unknown_token_id": 0,
        },
    )
    return tokenizer, _rebuilt(path), path.parent


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_are_those_of_the_model(qwen2, text: str) -> None:
    want, seen, _ = qwen2
    assert seen.encode(text).ids == want.encode(text).ids
    assert seen.decode(seen.encode(text).ids) == want.decode(want.encode(text).ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_the_tokens_of_the_model(qwen2, llama, text: str) -> None:
    want, seen, _ = qwen2
    assert seen.encode(text).ids == want.encode(text).ids
    want, seen, _ = llama
    assert seen.encode(text, add_special_tokens=False).ids == want.encode(text).ids


@pytest.mark.parametrize("text", TEXTS)
def test_sentence_piece_tokens_come_from_scores(llama, text: str) -> None:
    want, seen, _ = llama
    ids = seen.encode(text).ids
    assert ids[0] == 1  # <s>
    assert ids[1:] == want.encode(text).ids
    assert seen.decode(ids) == text


def test_companions_tell_special_tokens_and_the_template(qwen2, llama) -> None:
    files = TokenizerFiles.read(qwen2[2])
    assert [files.token_text(f"{key}_token") for key in ("eos", "pad")] == [
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert files.config["chat_template"] == "{{ messages }}"
    assert files.prefix_ids() == []
    assert "[PAD2]" not in files.ids
    files = TokenizerFiles.read(llama[2])
    assert (files.token_id("eos_token"), files.prefix_ids()) == (2, [1])
    assert files.tokenizer_info() == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }


def test_merges_of_higher_scores_come_first() -> None:
    ids = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    scores = np.array([-9, -9, -9, -2.0, -1.0, -3.0])
    assert merges_of_scores(ids, scores) == [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": [-1000.0] * 4}, "one score for all tokens, which does not tell how"),
        ({}, "kind 'llama' without scores; put the tokenizer.json of the model beside the file"),
        ({"model": "bert"}, "a vocabulary of the kind 'bert'; known: 'gpt2' and 'llama'"),
        ({"model": "gpt2", "pre": "mpt"}, "splits text as 'mpt'; known: 'qwen2'"),
        ({"model": "gpt2", "pre": "qwen2"}, "lacks the texts tokenizer.ggml.merges"),
        (
            {"model": "gpt2", "pre": "qwen2", "merges": ["a zz"]},
            r"the merge \['a', 'zz'\] is not one of two tokens to a third",
        ),
        ({"token_type": [1, 1]}, "4 tokens and 2 types"),
        ({"tokens": ["a", "a", "ab", "abc"]}, "the same token twice"),
        ({"model": [1, 2]}, r"tokenizer.ggml.model = array.*; allowed: a text"),
        ({"model": "gpt2", "pre": ["qwen2"]}, r"pre = \['qwen2'\]; allowed: a text"),
        (
            {"scores": [-1.0, -2.0, -3.0, -4.0], "bos_token_id": 0, "add_bos_token": [0, 1]},
            "add_bos_token = array.*; allowed: true or false",
        ),
        (
            {"scores": [-1.0, -2.0, -3.0, -4.0], "add_space_prefix": "no"},
            "add_space_prefix = 'no'; allowed: true or false",
        ),
        ({"scores": [-1.0, -2.0, -3.0, float("nan")]}, "scores of tokens that are not finite"),
        (
            {"tokens": ["a", "b", "ab", "a" * 100_000], "scores": [-1.0, -2.0, -3.0, -4.0]},
            "a token of 100000 characters; allowed: up to 256",
        ),
    ],
)
def test_vocabularies_that_tell_too_little_are_refused(
    tmp_path: Path, changes: dict, words: str
) -> None:
    metadata = {"model": "llama", "tokens": ["a", "b", "ab", "abc"], "token_type": [1, 1, 1, 1]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}
    path = write_gguf(tmp_path / "x.gguf", metadata, {})
    with pytest.raises(FairyError, match=words):
        write_tokenizer(GgufFile(path), tmp_path)


def test_a_tokenizer_beside_the_file_wins(tmp_path: Path, qwen2) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((qwen2[2] / name).read_text())
    source = open_source(Fairy2i().save(tmp_path / "m.gguf", **{"tokenizer.ggml.model": "llama"}))
    found = {path.name: path.read_text() for path in source.tokenizer_files()}
    assert found["tokenizer.json"] == (tmp_path / "tokenizer.json").read_text()
    assert set(found) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_alone_is_completed_with_the_files_own_template(tmp_path: Path, qwen2) -> None:
    (tmp_path / "tokenizer.json").write_text((qwen2[2] / "tokenizer.json").read_text())
    own = {"tokenizer.chat_template": "{{ messages }}"}
    source = open_source(Fairy2i().save(tmp_path / "m.gguf", **own))
    assert TokenizerFiles.read(source.directory).config["chat_template"] == "{{ messages }}"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, qwen2, llama) -> None:
    tokens = {"tokenizer.ggml.tokens": _tokens(llama[0])[:256], "tokenizer.ggml.model": "llama"}
    path = Fairy2i().save(tmp_path / "m.gguf", **tokens)
    for directory, fits in ((llama[2], True), (qwen2[2], False)):
        (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
        if fits:
            open_source(path)
            continue
        with pytest.raises(FairyError, match=r"tokenizer of another model: \d+ of \d+ tokens"):
            open_source(path)


def test_a_vocabulary_has_rows_in_the_embedding(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(257)]}
    path = Fairy2i().save(tmp_path / "m.gguf", **tokens, **{"tokenizer.ggml.model": "gpt2"})
    with pytest.raises(FairyError, match="257 tokens in its vocabulary and 256 rows"):
        open_source(path)


def test_the_note_says_where_the_tokenizer_is_from(tmp_path: Path, qwen2) -> None:
    path = Fairy2i().save(tmp_path / "m.gguf")
    source = open_source(path)
    _, note = source.settle(QuantConfig())
    assert note is not None
    assert "it has no tokenizer, and artifacts without one cannot be loaded" in note
    (tmp_path / "tokenizer.json").write_text((qwen2[2] / "tokenizer.json").read_text())
    _, note = open_source(path).settle(QuantConfig())
    assert note is not None
    assert note.endswith(f"its tokenizer is {tmp_path / 'tokenizer.json'}")
