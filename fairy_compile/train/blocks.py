"""Tokens on disk, cut into blocks: what the trainer reads.

Documents are joined, each with the tokens the tokenizer puts before a text and its end-of-text
token, into one file of uint32, and cut into blocks of a fixed length without padding; a last block
that would be short is dropped. Attention crosses the documents of a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.files import hash_files
from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.documents import data_files, documents
from fairy_compile.errors import FairyError

_DTYPE = np.dtype("<u4")
_BATCH = 64


def tokenizer_path(directory: Path) -> Path:
    """Return the ``tokenizer.json`` of a directory.

    Raises:
        FairyError: there is none.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FairyError(
            f"{directory} has no tokenizer.json; give a directory that has one with --tokenizer "
            "DIR (transformers writes it with tokenizer.save_pretrained)"
        )
    return path


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """Check that the ids of a tokenizer fit a model.

    Raises:
        FairyError: the tokenizer has an id that the model has no embedding for.
    """
    ids = _load(directory).get_vocab(with_added_tokens=True).values()
    highest = max(ids, default=-1)
    if highest >= vocab_size:
        raise FairyError(
            f"the tokenizer in {directory} has ids up to {highest}, but the model's vocabulary is "
            f"{vocab_size} tokens; give the model's own tokenizer with --tokenizer DIR"
        )


def _load(directory: Path) -> Any:
    from tokenizers import Tokenizer

    path = tokenizer_path(directory)
    try:
        return Tokenizer.from_buffer(path.read_bytes())  # its path need not be Unicode
    except Exception as error:  # the Rust binding raises plain Exception
        raise FairyError(f"{path} is not a valid tokenizer: {error}") from error


def write_tokens(
    data: str | Path,
    tokenizer: Path,
    path: Path,
    *,
    eos: int | None = None,
    field: str = "text",
    resuming: bool = False,
) -> np.ndarray:
    """Tokenise ``data`` into the file ``path``, or reuse the file of the same data.

    Args:
        data: see `fairy_compile.documents`.
        tokenizer: directory with tokenizer.json.
        path: file to write; ``<path>.json`` beside it says what it was made of.
        eos: token to put after every document; None for none.
        field: key or column of the text.
        resuming: the file was made when the run began; other data now would spoil the run.

    Returns:
        uint32 (tokens,), memory-mapped.

    Raises:
        FairyError: the data holds no token, changed since the run began, or `data_files` and
            `documents` refuse it.
    """
    files = data_files(data)
    key = _identity(files, tokenizer, eos, field)
    label = path.with_name(path.name + ".json")
    noted = _read_label(label)
    size = path.stat().st_size if path.is_file() else 0
    if noted.get("key") != key or noted.get("tokens", 0) * _DTYPE.itemsize != size:
        if resuming and not noted:
            raise FairyError(
                f"{label} is missing or damaged, which tells whether the data {data} is still that "
                f"of the run; remove {path.parent} to begin anew"
            )
        if resuming and noted["key"] != key:  # tokens of the same data are made again
            raise FairyError(
                f"the data {data} or the tokenizer changed since the run in {path.parent} began; "
                "bring the files back, or remove that directory to begin anew"
            )
        partial = path.with_name(path.name + ".partial")
        encoder, before = _load(tokenizer), TokenizerFiles.read(tokenizer).prefix_ids()
        count = 0
        with partial.open("wb") as out:
            for ids in _encoded(files, field, encoder, before, [] if eos is None else [eos]):
                out.write(ids.tobytes())
                count += len(ids)
        if not count:
            raise _no_text(data, files)
        partial.replace(path)
        label.write_text(json.dumps({"key": key, "tokens": count}) + "\n")
    return np.memmap(path, _DTYPE, mode="r")


def _read_label(path: Path) -> dict[str, Any]:
    """Return what the file beside tokens says of them, ``{}`` where it says nothing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    well_formed = isinstance(value, dict) and type(value.get("tokens")) is int and "key" in value
    return value if well_formed else {}


def read_tokens(
    data: str | Path, tokenizer: Path, *, eos: int | None, field: str, limit: int
) -> np.ndarray:
    """Return the first ``limit`` tokens of ``data``, or all where it has fewer: uint32 (tokens,).

    Args:
        data: see `fairy_compile.documents`.
        tokenizer: directory with tokenizer.json.
        eos: token to put after every document; None for none.
        field: key or column of the text.
        limit: text behind so many tokens is not read.

    Raises:
        FairyError: the data holds no token, or `data_files` and `documents` refuse it.
    """
    files = data_files(data)
    encoder, before = _load(tokenizer), TokenizerFiles.read(tokenizer).prefix_ids()
    parts: list[np.ndarray] = []
    count = 0
    for ids in _encoded(files, field, encoder, before, [] if eos is None else [eos]):
        parts.append(ids)
        count += len(ids)
        if count >= limit:
            break
    if not count:
        raise _no_text(data, files)
    return np.concatenate(parts)[:limit]


def _no_text(data: str | Path, files: list[Path]) -> FairyError:
    return FairyError(
        f"the data {data} is empty: its {len(files)} files hold no text; give files with text in "
        "them"
    )


def _identity(files: list[Path], tokenizer: Path, eos: int | None, field: str) -> str:
    parts: list[Any] = [eos, field, hash_files({"t": tokenizer_path(tokenizer)})]
    for file in files:
        inner = [file] if file.is_file() else sorted(p for p in file.rglob("*") if p.is_file())
        parts += [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in inner]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _encoded(
    files: list[Path], field: str, encoder: Any, before: list[int], after: list[int]
) -> Iterator[np.ndarray]:
    """Yield the tokens of the documents in order, some documents at a time."""
    texts: list[str] = []
    marks: list[tuple[bool, bool]] = []  # whether a piece begins and ends a document

    def flush() -> Iterator[np.ndarray]:
        encodings = encoder.encode_batch(texts, add_special_tokens=False)
        for (first, last), encoding in zip(marks, encodings, strict=True):
            ids = [*(before if first else ()), *encoding.ids, *(after if last else ())]
            yield np.array(ids, _DTYPE)
        texts.clear()
        marks.clear()

    for file in files:
        for document in documents(file, field):
            held: str | None = None
            first = True
            for piece in document:
                if held is not None:
                    texts.append(held)
                    marks.append((first, False))
                    first = False
                    yield from flush()
                held = piece
            if held:
                texts.append(held)
                marks.append((first, True))
            if len(texts) >= _BATCH:
                yield from flush()
    yield from flush()


class Blocks:
    """A torch dataset (map style) of blocks of tokens.

    Attributes:
        tokens: uint32 (tokens,).
        block: tokens a block.
        index: which blocks belong to it.
    """

    def __init__(self, tokens: np.ndarray, block: int, index: np.ndarray):
        self.tokens, self.block, self.index = tokens, block, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Any]:
        import torch

        start = int(self.index[item]) * self.block
        ids = np.asarray(self.tokens[start : start + self.block], np.int64)
        return {"input_ids": torch.from_numpy(ids)}


def split(tokens: np.ndarray, block: int, share: float) -> tuple[Blocks, Blocks | None]:
    """Cut tokens into blocks; hold out a share of them, evenly spread.

    Args:
        tokens: uint32 (tokens,).
        block: tokens a block.
        share: of the blocks to hold out; above 0 at least one, if two or more are there.

    Returns:
        Blocks to train on, and blocks to evaluate on or None.

    Raises:
        FairyError: there are fewer tokens than one block.
    """
    count = len(tokens) // block
    if count == 0:
        raise FairyError(
            f"the data is {len(tokens)} tokens, less than one block of {block}; give more text or "
            "a smaller --block"
        )
    everything = np.arange(count)
    held = max(1, round(share * count)) if share > 0 and count > 1 else 0
    if not held:
        return Blocks(tokens, block, everything), None
    held = min(held, count - 1)
    chosen = np.unique(((np.arange(held) + 0.5) * count / held).astype(np.int64))
    rest = np.setdiff1d(everything, chosen)
    return Blocks(tokens, block, rest), Blocks(tokens, block, chosen)
