"""The tokenizer files of a GGUF file: tokenizer.json and tokenizer_config.json of its metadata.

Vocabularies are of two kinds there: ``gpt2``, byte-level BPE with its merges, whose rule for
splitting text has a name (``tokenizer.ggml.pre``), and ``llama``, SentencePiece's BPE, which has
scores and no merges. A merge is of two tokens to a third, and tokens of higher scores are merged
first, so scores give merges where they differ. The authors' converter of Llama models writes one
score for all tokens, and with it nothing tells what is merged first: such files need the model's
own tokenizer.json beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.files import read_json_object
from fairy_compile.frontends.gguf_file import GgufFile

# Kinds of tokens, tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_DIGITS = {"qwen2": r"\p{N}", "llama-bpe": r"\p{N}{1,3}", "deepseek-r1-qwen": r"\p{N}"}
"""tokenizer.ggml.pre -> how digits are split."""

_SPACE = "\u2581"
TOKENIZER_LIMIT = 128 << 20
LONGEST = 256
"""Most characters of a token whose merges are looked for: their number grows with its square."""


def write_tokenizer(file: GgufFile, directory: Path) -> None:
    """Write the files of a GGUF file's tokenizer; none where it has no vocabulary.

    Raises:
        ModelFileError: the vocabulary is damaged.
        UnsupportedError: it is of a kind not known here, or tells too little.
    """
    kind = file.metadata.get("tokenizer.ggml.model", "no_vocab")
    if isinstance(kind, str) and kind == "no_vocab":
        return
    vocabulary = _Vocabulary(file)
    kind = vocabulary.text("model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise vocabulary.refuse(f"a vocabulary of the kind {kind!r}; known: 'gpt2' and 'llama'")
    (directory / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8"
    )
    write_config(file, directory)


def write_config(file: GgufFile, directory: Path) -> None:
    """Write tokenizer_config.json: the names of special tokens, and the chat template."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    config: dict[str, Any] = {}
    for name, key in names.items():
        number = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(tokens, list) and type(number) is int and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(config, ensure_ascii=False, indent=1)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def check_fit(file: GgufFile, path: Path) -> None:
    """Check that a tokenizer.json has the tokens of a file's own vocabulary.

    Files of several models may lie in one directory, and the ids of another model's tokenizer mean
    nothing to this one.

    Raises:
        ModelFileError: most tokens with the same id are others, or it is no JSON object.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return
    # Converters differ in how they write spaces, and in the names of tokens that are not used.
    theirs = {number: text.replace(_SPACE, " ") for number, text in _tokens_of(path)}
    both = [number for number in range(len(tokens)) if number in theirs]
    other = [number for number in both if tokens[number].replace(_SPACE, " ") != theirs[number]]
    if 2 * len(other) > len(both):
        raise ModelFileError(
            f"{path} is the tokenizer of another model: {len(other)} of {len(both)} tokens are not "
            f"those of {file.path.name}, such as number {other[0]}, {theirs[other[0]]!r} and "
            f"{tokens[other[0]]!r}; put the GGUF file into a directory of its own, with the "
            "tokenizer.json of its model or none"
        )


def _tokens_of(path: Path) -> list[tuple[int, str]]:
    """Return (id, text) of the tokens in a tokenizer.json."""
    tokenizer = read_json_object(path, TOKENIZER_LIMIT)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = [(n, text) for text, n in vocabulary.items()] if isinstance(vocabulary, dict) else []
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            found.append((token.get("id"), token.get("content")))
    return [(n, text) for n, text in found if type(n) is int and isinstance(text, str)]


class _Vocabulary:
    """The metadata ``tokenizer.*`` of a file, checked.

    Attributes:
        tokens: texts; ids count from 0.
        types: kind of each.
    """

    def __init__(self, file: GgufFile) -> None:
        self.path, self._metadata = file.path, file.metadata
        self.tokens = self.texts("tokens")
        if len(set(self.tokens)) != len(self.tokens):
            raise ModelFileError(f"{self.path} has the same token twice in its vocabulary")
        types = self._metadata.get("tokenizer.ggml.token_type")
        if types is None:
            types = np.full(len(self.tokens), _NORMAL)
        if not isinstance(types, np.ndarray) or types.shape != (len(self.tokens),):
            raise ModelFileError(
                f"{self.path} has {len(self.tokens)} tokens and {np.size(types)} types of tokens"
            )
        self.types: list[int] = types.tolist()

    def refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.path} has {what}; put the tokenizer.json of the model beside the file"
        )

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str) -> str | None:
        """Return a value that is a text, None where there is none."""
        return self._typed(key, str, "a text")

    def flag(self, key: str) -> bool | None:
        """Return a value that is true or false, None where there is none."""
        return self._typed(key, bool, "true or false")

    def _typed(self, key: str, kind: type, allowed: str) -> Any:
        value = self.get(key)
        if value is not None and not isinstance(value, kind):
            raise ModelFileError(
                f"{self.path} has tokenizer.ggml.{key} = {f'{value!r:.80}'}; allowed: {allowed}"
            )
        return value

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list):
            raise ModelFileError(f"{self.path} lacks the texts tokenizer.ggml.{key}")
        return value

    def ids(self, *types: int) -> dict[str, int]:
        """Return text -> id of tokens of some kinds."""
        pairs = zip(self.tokens, self.types, strict=True)
        return {token: i for i, (token, kind) in enumerate(pairs) if kind in types}

    def special(self, key: str) -> str | None:
        """Return the text of e.g. the token ``bos``."""
        number = self.get(f"{key}_token_id")
        if type(number) is not int or not 0 <= number < len(self.tokens):
            return None
        return self.tokens[number]

    def added(self) -> list[dict[str, Any]]:
        """Return ``added_tokens``: control tokens and those of users, found before splitting."""
        found = self.ids(_CONTROL, _USER, _UNKNOWN)
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": self.types[number] != _USER,
            }
            for token, number in found.items()
        ]

    def prefix(self, default: bool) -> dict[str, Any] | None:
        """Return the ``post_processor`` that puts a token before every text, if one does."""
        bos, adds = self.special("bos"), self.flag("add_bos_token")
        if bos is None or not (default if adds is None else adds):
            return None
        number = int(self.get("bos_token_id"))
        piece = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        return {
            "type": "TemplateProcessing",
            "single": [piece, text],
            "pair": [piece, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
        }


def _tokenizer(
    vocabulary: _Vocabulary, model: dict[str, Any], post: dict[str, Any] | None, **parts: Any
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        **parts,
        "post_processor": post,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "ignore_merges": False,
            **model,
        },
    }


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = vocabulary.text("pre")
    if pre not in _DIGITS:
        known = ", ".join(map(repr, _DIGITS))
        raise vocabulary.refuse(f"a tokenizer that splits text as {pre!r}; known: {known}")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + _DIGITS[pre]
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bytes_as_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    merges = [pair.split(" ") for pair in vocabulary.texts("merges")]
    ids = vocabulary.ids(_NORMAL, _BYTE)
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise ModelFileError(
                f"{vocabulary.path}: the merge {f'{pair!r:.80}'} is not one of two tokens to a "
                "third; the file is damaged, download it again"
            )
    return _tokenizer(
        vocabulary,
        {"vocab": ids, "merges": merges, "unk_token": None, "fuse_unk": False}
        | {"byte_fallback": False},
        vocabulary.prefix(False),
        normalizer=None if pre == "llama-bpe" else {"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**bytes_as_text, "use_regex": False},
            ],
        },
        decoder={**bytes_as_text, "use_regex": False},
    )


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    scores = vocabulary.get("scores")
    ids = vocabulary.ids(_NORMAL, _UNKNOWN, _CONTROL, _BYTE)
    if not isinstance(scores, np.ndarray) or scores.shape != (len(vocabulary.tokens),):
        raise vocabulary.refuse("a vocabulary of the kind 'llama' without scores")
    if not np.isfinite(scores).all():
        raise vocabulary.refuse("scores of tokens that are not finite")
    normal = vocabulary.ids(_NORMAL)
    if (longest := max(map(len, normal), default=0)) > LONGEST:
        raise vocabulary.refuse(f"a token of {longest} characters; allowed: up to {LONGEST}")
    long = [scores[number] for token, number in normal.items() if len(token) > 1]
    if long and min(long) == max(long):
        raise vocabulary.refuse("one score for all tokens, which does not tell how text is split")
    unknown = vocabulary.special("unknown")
    spaced = vocabulary.flag("add_space_prefix")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [] if spaced is False else [{"type": "Prepend", "prepend": _SPACE}]
    after = [] if spaced is False else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return _tokenizer(
        vocabulary,
        {
            "vocab": ids,
            "merges": merges_of_scores(normal, scores),
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": bool(vocabulary.ids(_BYTE)),
        },
        vocabulary.prefix(True),
        normalizer={"type": "Sequence", "normalizers": [*before, replace]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
    )


def merges_of_scores(ids: dict[str, int], scores: Sequence[float]) -> list[list[str]]:
    """Return the merges of a SentencePiece BPE vocabulary, the first to be made first.

    Every way to put a token together of two others is a merge; SentencePiece makes those of the
    highest score first.

    Args:
        ids: text -> id of ordinary tokens.
        scores: of every id.
    """
    merges = []
    for token in ids:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    order = {pair: scores[ids["".join(pair)]] for pair in merges}
    return [list(pair) for pair in sorted(order, key=order.__getitem__, reverse=True)]
