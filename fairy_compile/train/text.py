"""Documents out of text, jsonl and parquet files, directories of them, and saved datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fairy_compile.errors import FairyError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_PIECE_BYTES = 1 << 22

Document = Iterator[str]  # pieces that join to the document's text


def data_files(data: str | Path) -> list[Path]:
    """Return the files that hold the documents, in a fixed order.

    Raises:
        FairyError: there is no such path, or the directory holds no file of a known kind.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FairyError(
            f"there is no data {path.absolute()}; give a text, jsonl or parquet file, a directory "
            "of them, or a dataset saved with save_to_disk"
        )
    if _is_saved_dataset(path):
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise FairyError(
            f"{path} holds no data: no file ends in {', '.join(SUFFIXES)}, and it is no dataset "
            "saved with save_to_disk"
        )
    return files


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def documents(file: Path, field: str = "text") -> Iterator[Document]:
    """Yield the documents of one of `data_files`.

    Args:
        file: a file; one that ends in neither ``.jsonl`` nor ``.parquet`` is one document.
        field: key or column of the text.

    Raises:
        FairyError: a file is not UTF-8, a line is not JSON, or there is no such key or column.
    """
    if file.is_dir():
        yield from _saved_dataset(file, field)
    elif file.suffix == ".parquet":
        yield from _parquet(file, field)
    elif file.suffix == ".jsonl":
        yield from _jsonl(file, field)
    else:
        yield _pieces(file)


def _pieces(file: Path) -> Iterator[str]:
    """Yield a text file in pieces that end at line ends."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            while lines := stream.readlines(_PIECE_BYTES):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise FairyError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start} of a piece; convert "
            "it, or leave it out"
        ) from error


def _jsonl(file: Path, field: str) -> Iterator[Document]:
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise FairyError(f"{file}, line {number} is not JSON: {error}") from error
                keys = sorted(entry) if isinstance(entry, dict) else []
                if field not in keys or not isinstance(entry[field], str):
                    raise FairyError(
                        f"{file}, line {number} has no text under {field!r}; it has "
                        f"{', '.join(keys) or 'no keys'}; choose one with --text-field"
                    )
                yield iter((entry[field],))
    except UnicodeDecodeError as error:
        raise FairyError(f"{file} is not UTF-8 text: {error.reason}; convert it") from error


def _parquet(file: Path, field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise FairyError(
            f"reading {file} needs pyarrow; install it with pip install 'fairy_compile[train]'"
        ) from error
    try:
        table = parquet.ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise FairyError(f"{file} is not a readable parquet file: {error}") from error
    _check_column(str(file), field, table.schema_arrow.names)
    for batch in table.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
            if text:
                yield iter((str(text),))


def _saved_dataset(directory: Path, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise FairyError(
            f"reading {directory} needs datasets; install it with "
            "pip install 'fairy_compile[train]'"
        ) from error
    loaded = datasets.load_from_disk(str(directory))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise FairyError(
                f"the dataset {directory} has the splits {', '.join(loaded)}, none called 'train'; "
                "give the directory of one of them"
            )
        loaded = loaded["train"]
    _check_column(str(directory), field, loaded.column_names)
    for entry in loaded.select_columns([field]):
        if entry[field]:
            yield iter((str(entry[field]),))


def _check_column(what: str, field: str, names: list[str]) -> None:
    if field not in names:
        raise FairyError(
            f"{what} has no column {field!r}; it has {', '.join(names)}; choose one with "
            "--text-field"
        )
