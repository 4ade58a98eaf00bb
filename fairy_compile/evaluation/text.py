"""`read_text`: the tokens of the text that a model is evaluated on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fairy_compile.config import check_choice
from fairy_compile.documents import data_files, documents
from fairy_compile.errors import FairyError
from fairy_compile.paths import as_path

if TYPE_CHECKING:
    from fairy_compile.runtime.text import Tokenizer

SPLITS = ("test", "validation", "train")
"""Names of splits; of several the first is taken."""

DEFAULT_JOIN = "\n\n"
"""What the GPTQ code, and every paper that follows it, puts between the rows of wikitext."""

# The ways files and folders of data sets spell their split, as the datasets library knows them.
_SPELLINGS = {
    "train": "train", "training": "train", "valid": "validation", "validation": "validation",
    "val": "validation", "dev": "validation", "test": "test", "testing": "test",
    "eval": "test", "evaluation": "test",
}  # fmt: skip
_WORDS = re.compile(r"[a-z]+")

_CHARACTERS_A_TOKEN = 8
_SPARE_TOKENS = 64


@dataclass(frozen=True)
class TextFacts:
    """The text of an evaluation.

    Attributes:
        path: as given.
        files: how many files it was read from.
        split: the split that was chosen of several; None where there was nothing to choose.
        join: what was put between documents.
        tokens: how many tokens.
        truncated: there was more text than ``--max-tokens``.
        tokens_sha256: hash of the tokens as little-endian uint32: equal where two results are of
            the same text and tokenizer.
    """

    path: str
    files: int
    split: str | None
    join: str
    tokens: int
    truncated: bool
    tokens_sha256: str


def read_text(
    data: str | Path,
    tokenizer: Tokenizer,
    prefix: Sequence[int] = (),
    *,
    field: str = "text",
    split: str | None = None,
    join: str = DEFAULT_JOIN,
    max_tokens: int | None = None,
) -> tuple[np.ndarray, TextFacts]:
    """Read documents, join them to one text and encode it.

    Args:
        data: see `fairy_compile.documents`.
        tokenizer: encodes.
        prefix: tokens to put before the text, what the tokenizer puts before every text.
        field: key or column of the text.
        split: which of `SPLITS` to read; default the first that a data set has, if its files name
            several.
        join: text between documents; empty rows of tables count as documents, as in the papers.
        max_tokens: read no more than makes so many tokens.

    Returns:
        int32 (tokens,), and what is to be said of it.

    Raises:
        FairyError: the text is empty, an argument is out of range, or `data_files` and `documents`
            refuse the data.
    """
    if max_tokens is not None and max_tokens < 2:
        raise FairyError(f"--max-tokens is {max_tokens}; allowed: 2 or more")
    files, chosen = choose_split(as_path("the data", data), data_files(data), split)
    pieces = _pieces(files, field, chosen or "train", join)
    ids, more = _encode(pieces, tokenizer, max_tokens)
    if not ids:
        raise FairyError(f"the text {data} is empty; give a file with text in it")
    tokens = np.array([*prefix, *ids], np.int32)
    truncated = max_tokens is not None and (more or len(tokens) > max_tokens)
    tokens = tokens[:max_tokens]
    digest = hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()
    facts = TextFacts(str(data), len(files), chosen, join, len(tokens), truncated, digest)
    return tokens, facts


def choose_split(root: Path, files: list[Path], split: str | None) -> tuple[list[Path], str | None]:
    """Return the files of one split, and its name if there was anything to choose.

    Files of a data set are told apart by words in their names or folders (``test-00000.parquet``,
    ``wiki.valid.raw``, ``validation/0.jsonl``). Without ``split`` nothing is chosen unless every
    file names a split and they differ.

    Raises:
        FairyError: there is no such split, or its files belong to several data sets.
    """
    if split is not None:
        check_choice("--split", split, SPLITS)
    if files == [root] and root.is_dir():  # saved with save_to_disk
        inside = [name for name in SPLITS if (root / name).is_dir()]
        if (root / "dataset_dict.json").is_file() and inside:
            return files, split or inside[0]
        return files, split
    named = {file: _split_of(file.relative_to(root)) for file in files if file != root}
    found = set(named.values())
    if split is None and (len(found) < 2 or None in found):
        return files, None
    chosen = split or next(name for name in SPLITS if name in found)
    kept = [file for file in files if named.get(file) == chosen]
    if not kept:
        present = ", ".join(sorted(name for name in found if name)) or "none by name"
        raise FairyError(
            f"{root} has no files of a split {chosen!r}; it has {present}; give one of its files, "
            "or leave --split out"
        )
    folders = sorted({_folder(file.relative_to(root)) for file in kept})
    if len(folders) > 1:
        raise FairyError(
            f"{root} holds several data sets with a split {chosen!r}: {', '.join(folders)}; give "
            f"the directory of one, such as {root / folders[0]}"
        )
    return kept, chosen


def _words(name: str) -> list[str]:
    return _WORDS.findall(name.lower())


def _split_of(path: Path) -> str | None:
    """Return the split a relative path names; the innermost name counts."""
    for part in reversed(path.parts):
        for word in _words(part):
            if word in _SPELLINGS:
                return _SPELLINGS[word]
    return None


def _folder(path: Path) -> str:
    """Return a relative path's folder without parts that only name a split."""
    parts = [part for part in path.parts[:-1] if part.lower() not in _SPELLINGS]
    return "/".join(parts) or "."


def _pieces(files: list[Path], field: str, split: str, join: str) -> Iterator[str]:
    """Yield pieces that join to the whole text."""
    first = True
    for file in files:
        for document in documents(file, field, split=split, keep_empty=True):
            if not first:
                yield join
            first = False
            yield from document


def _encode(
    pieces: Iterator[str], tokenizer: Tokenizer, max_tokens: int | None
) -> tuple[list[int], bool]:
    """Return tokens, and whether there was more text than ``max_tokens`` took.

    The text is encoded as a whole: tokens may cross any place it could be cut at.
    """
    if max_tokens is None:
        return tokenizer.encode("".join(pieces), special=False), False
    text, wanted = "", max_tokens * _CHARACTERS_A_TOKEN
    while True:
        parts, length, more = [text], len(text), False
        for piece in pieces:
            parts.append(piece)
            length += len(piece)
            if length >= wanted:
                more = True
                break
        text = "".join(parts)
        # Cut in the middle of a word the last tokens would be others, so some are to spare.
        ids = tokenizer.encode(text[:wanted], special=False)
        more = more or len(text) > wanted
        if not more or len(ids) >= max_tokens + _SPARE_TOKENS:
            return ids, more
        wanted *= 2
