"""What MLC wants to know about a tokenizer, read from its files; copying those files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairy_compile.artifact.schema import load_object, show
from fairy_compile.errors import ModelFileError

MLC_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
"""The names MLC's generator lists under ``tokenizer_files``."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Parsed tokenizer files of a model directory; empty dictionaries for files it lacks.

    Attributes:
        directory: the model directory.
        tokenizer: ``tokenizer.json``.
        config: ``tokenizer_config.json``.
        ids: token text -> id, vocabulary and added tokens.
    """

    directory: Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    ids: dict[str, int] = field(repr=False)

    @classmethod
    def read(cls, directory: Path | str) -> TokenizerFiles:
        """Read the files of ``directory``.

        Raises:
            ModelFileError: a file is no JSON object, or an added token appears twice (which
                tokenizers resolve differently).
        """
        directory = Path(directory)
        tokenizer = _optional(directory / "tokenizer.json")
        return cls(
            directory,
            tokenizer,
            _optional(directory / "tokenizer_config.json"),
            _token_ids(tokenizer, directory),
        )

    def token_id(self, key: str) -> int | None:
        """Return the id of e.g. ``eos_token`` of ``tokenizer_config.json``, if it has one."""
        return self.ids.get(self.token_text(key))

    def token_text(self, key: str) -> str:
        """Return the text of e.g. ``bos_token`` of ``tokenizer_config.json``, or ``""``."""
        token = self.config.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else ""

    def special_tokens(self) -> dict[str, int]:
        """Return text -> id of the added tokens that are marked special."""
        added = _objects(self.tokenizer.get("added_tokens"))
        return {
            token["content"]: self.ids[token["content"]]
            for token in added
            if token.get("special") is True and token.get("content") in self.ids
        }

    def prefix_ids(self) -> list[int]:
        """Return the ids the tokenizer puts before a text, usually ``[bos]`` or nothing."""
        for processor in _steps(self.tokenizer.get("post_processor"), "processors"):
            if processor.get("type") == "TemplateProcessing":
                return self._template_prefix(processor)
        bos = self.token_id("bos_token")
        return [bos] if self.config.get("add_bos_token") is True and bos is not None else []

    def _template_prefix(self, processor: Mapping[str, Any]) -> list[int]:
        ids = []
        for piece in _objects(processor.get("single")):
            if "Sequence" in piece:
                break
            special = piece.get("SpecialToken")
            token = special.get("id") if isinstance(special, dict) else None
            if isinstance(token, str) and token in self.ids:
                ids.append(self.ids[token])
        return ids

    def tokenizer_info(self) -> dict[str, Any]:
        """Return MLC's ``tokenizer_info`` object, all three members.

        ``byte_level`` or ``byte_fallback`` comes from the decoder, else from the BPE model's own
        flag; a ``Prepend`` normaliser or a Metaspace that prepends means a space is prepended
        in encoding; a ``Strip`` decoder of one leading space, or that same Metaspace, means it is
        stripped in decoding.
        """
        decoders = _steps(self.tokenizer.get("decoder"), "decoders")
        normalizers = _steps(self.tokenizer.get("normalizer"), "normalizers")
        pre_tokenizers = _steps(self.tokenizer.get("pre_tokenizer"), "pretokenizers")
        types = [step.get("type") for step in decoders]
        if "ByteLevel" in types:
            method = "byte_level"
        elif "ByteFallback" in types or not any(
            step.get("type") == "ByteLevel" for step in pre_tokenizers
        ):
            method = "byte_fallback"
        else:
            method = "byte_level"
        return {
            "token_postproc_method": method,
            "prepend_space_in_encode": any(
                step.get("type") == "Prepend" and step.get("prepend") == "\u2581"
                for step in normalizers
            )
            or any(map(_metaspace_prepends, pre_tokenizers)),
            "strip_space_in_decode": any(
                (step.get("type"), step.get("content"), step.get("start"), step.get("stop"))
                == ("Strip", " ", 1, 0)
                for step in decoders
            )
            or any(map(_metaspace_prepends, decoders)),
        }

    def present(self) -> list[str]:
        """Return which of `MLC_TOKENIZER_FILES` the directory has."""
        return [name for name in MLC_TOKENIZER_FILES if (self.directory / name).is_file()]


def copy_tokenizer_files(paths: Iterable[Path], destination: Path | str) -> list[str]:
    """Copy a source's tokenizer, chat template and generation files; return their names.

    Args:
        paths: files that were checked not to be links out of the model's directory.
        destination: directory to copy into.
    """
    names = []
    for path in paths:
        shutil.copyfile(path, Path(destination) / path.name)
        names.append(path.name)
    return names


def _optional(path: Path) -> dict[str, Any]:
    return load_object(path) if path.is_file() else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _steps(stage: Any, members: str) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer stage: of a ``Sequence`` its members, else itself."""
    if not isinstance(stage, dict):
        return []
    return _objects(stage.get(members)) if stage.get("type") == "Sequence" else [stage]


def _metaspace_prepends(step: Mapping[str, Any]) -> bool:
    if step.get("type") != "Metaspace":
        return False
    scheme = step.get("prepend_scheme")
    return scheme in ("always", "first") if scheme else step.get("add_prefix_space") is True


def _token_ids(tokenizer: Mapping[str, Any], directory: Path) -> dict[str, int]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocab, dict):
        ids = {token: i for token, i in vocab.items() if isinstance(i, int)}
    elif isinstance(vocab, list):  # Unigram: [[text, score], …]
        ids = {
            entry[0]: i
            for i, entry in enumerate(vocab)
            if isinstance(entry, list) and entry and isinstance(entry[0], str)
        }
    seen: set[str] = set()
    for token in _objects(tokenizer.get("added_tokens")):
        text, number = token.get("content"), token.get("id")
        if not isinstance(text, str) or not isinstance(number, int):
            raise ModelFileError(
                f"{directory / 'tokenizer.json'} has the added token {show(token)}; expected an "
                "object with content and id"
            )
        if text in seen:
            raise ModelFileError(
                f"{directory / 'tokenizer.json'} has the added token {show(text)} twice; remove "
                "one of them"
            )
        seen.add(text)
        ids[text] = number
    return ids
