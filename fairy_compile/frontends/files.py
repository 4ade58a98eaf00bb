"""Reading the files of a model directory that may have been made to harm: names, paths, JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fairy_compile.artifact.files import hash_files
from fairy_compile.errors import ModelFileError

CONFIG_LIMIT = 1 << 20
INDEX_LIMIT = 32 << 20

# What tokenizers, chat templates and samplers read; copied beside every checkpoint and artifact.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def plain_file_name(name: Any, listed_in: Path) -> str:
    """Return ``name`` if it is a bare file name, as an index of shards must give.

    Raises:
        ModelFileError: the name is not text, has a folder part, or is ``.`` or ``..``.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or any(c in name for c in "/\\:\0")
        or not name.isprintable()
    ):
        raise ModelFileError(
            f"{listed_in} names the file {name!r}; allowed: plain file names of the same directory"
        )
    return name


def member(directory: Path, name: str) -> Path | None:
    """Return the path of the regular file ``name`` in ``directory``, or None if there is none.

    A symbolic link may point inside the directory and, where the directory is a snapshot of the
    Hugging Face hub's cache (``models--org--name/snapshots/<revision>``), at the cache's
    ``blobs``. A link to anywhere else would let a downloaded model read the user's other files.

    Raises:
        ModelFileError: the link leaves the directory, or the name is not a regular file.
    """
    path = directory / name
    if not path.is_symlink() and not path.exists():
        return None
    root, target = directory.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise ModelFileError(
            f"{path} is a symbolic link to {target}, outside the model directory; replace it by "
            "the file itself"
        )
    if not target.is_file():
        raise ModelFileError(f"{path} is not a regular file; restore or download it again")
    return path


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object from untrusted UTF-8 text; ``what`` names it in errors.

    Raises:
        ModelFileError: the text is not UTF-8 JSON, not an object, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {twice!r} appears twice")
        return out

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_json_object(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """Read a JSON object of at most ``limit`` bytes.

    Raises:
        ModelFileError: the file is longer, or `parse_json_object` refuses it.
    """
    with path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ModelFileError(f"{path} is over {limit} bytes; allowed: at most {limit}")
    return parse_json_object(text, str(path))


def read_config(directory: Path) -> dict[str, Any]:
    """Read the model description, ``config.json``.

    Raises:
        ModelFileError: it is missing or not a JSON object of at most 1 MiB.
    """
    path = member(directory, "config.json")
    if path is None:
        raise ModelFileError(
            f"{directory} has no config.json; a model directory holds config.json, "
            "model.safetensors (or shards with an index) and tokenizer files"
        )
    return read_json_object(path)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


# Architectures whose config.json need not say that the head is tied to the embedding.
TIED_BY_DEFAULT = frozenset({"gemma2", "gemma3_text"})


def tied_tensors(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Return name -> stored tensor of weights that exist only as another tensor's.

    The output head of a model with ``tie_word_embeddings`` is its embedding, and yet a linear
    layer of its own: it may be quantised while the embedding is not.
    """
    default = config.get("model_type") in TIED_BY_DEFAULT
    tied = bool(config.get("tie_word_embeddings", default))
    return {HEAD: EMBEDDING} if tied and EMBEDDING in names and HEAD not in names else {}


class ModelDirectory:
    """What every source read from a directory shares: tokenizer files and hashes.

    Attributes:
        directory, origin: the model directory.
        weight_files: index and weight files, in the order they were opened.
    """

    def __init__(self, directory: Path, weight_files: list[Path]):
        self.directory = self.origin = directory
        self.weight_files = weight_files
        self._sha256: dict[str, str] | None = None

    def tokenizer_files(self) -> list[Path]:
        """Return the tokenizer, chat template and generation files that are there."""
        found = (member(self.directory, name) for name in TOKENIZER_FILES)
        return [path for path in found if path is not None]

    def sha256(self) -> dict[str, str]:
        """Return file name -> SHA-256 (hex) of every file read; computed on the first call."""
        if self._sha256 is None:
            paths = [self.directory / "config.json", *self.weight_files, *self.tokenizer_files()]
            self._sha256 = hash_files({path.name: path for path in paths})
        return self._sha256
