"""Documents out of text, jsonl, parquet and arrow files, directories of them, saved datasets.

Text and jsonl files need nothing but Python. JSON lines may be compressed (``.jsonl.gz``,
``.json.gz``), as those of C4 are.
"""

from __future__ import annotations

import gzip
import json
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError
from fairy_compile.paths import as_path

TEXT = (".txt", ".md", ".py", ".raw")
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
TABLES = (".parquet", ".arrow")
SUFFIXES = (*TEXT, *JSON_LINES, *TABLES)
DESCRIPTIONS = (".md", ".py")
"""What a dataset's directory says of itself, README.md and its loading script: no data there."""

_PIECE_BYTES = 1 << 22
_ALLOWED = (
    "a text, jsonl or parquet file, a directory of them, or a dataset saved with save_to_disk"
)

Document = Iterator[str]  # pieces that join to the document's text


def data_files(data: str | Path) -> list[Path]:
    """Return the files that hold the documents, in a fixed order.

    Raises:
        FairyError: there is no such path, it is neither file nor directory or cannot be read, or
            the directory holds no file of a known kind.
    """
    path = as_path("the data", data)
    if data == "":  # as an unset variable of a shell is; the current directory is "."
        raise FairyError(f"the data is an empty text; give {_ALLOWED}")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            next(path.iterdir(), None)  # `rglob` takes those it may not read for empty ones
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FairyError(f"there is no data {path.absolute()}; give {_ALLOWED}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        pipe = stat.S_ISFIFO(mode)
        raise FairyError(
            f"the data {path} is {'a pipe' if pipe else 'a device or socket'}, which is not read; "
            f"give {_ALLOWED}{': write to a file what comes through the pipe' if pipe else ''}"
        )
    if _is_saved_dataset(path):
        return [path]
    files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if any(p.name.endswith(TABLES) or p.suffix == ".gz" for p in files):
        files = [p for p in files if p.suffix not in DESCRIPTIONS]
    if not files:
        raise FairyError(
            f"{path} holds no data: no file ends in {', '.join(SUFFIXES)}, and it is no dataset "
            "saved with save_to_disk"
        )
    return files


def _unreadable(path: Path, error: OSError) -> FairyError:
    return FairyError(
        f"cannot read the data {path}: {error.strerror or error}; give data that this user may read"
    )


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def documents(
    file: Path, field: str = "text", *, split: str = "train", keep_empty: bool = False
) -> Iterator[Document]:
    """Yield the documents of one of `data_files`.

    Args:
        file: a file; one that ends in none of `JSON_LINES` and `TABLES` is one document.
        field: key or column of the text.
        split: which split of a saved dataset that has several.
        keep_empty: yield the empty rows of tables too.

    Raises:
        FairyError: a file cannot be read, is not UTF-8, a line is not JSON, or there is no such
            key, column or split.
    """
    if file.is_dir():
        rows = _saved_dataset(file, field, split)
    elif file.suffix in TABLES:
        rows = _parquet(file, field) if file.suffix == ".parquet" else _arrow(file, field)
    elif file.name.endswith(JSON_LINES):
        yield from _jsonl(file, field)
        return
    else:
        yield _pieces(file)
        return
    for text in rows:
        if not isinstance(text, str | None):  # numbers and lists would be trained on as Python
            raise FairyError(
                f"column {field!r} of {file} holds {text!r:.40}, no text; choose a column of text "
                "with --text-field"
            )
        if text or keep_empty:
            yield iter((text or "",))


def _pieces(file: Path) -> Iterator[str]:
    """Yield a text file in pieces that end at line ends."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            while lines := stream.readlines(_PIECE_BYTES):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise FairyError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start} of a piece; convert "
            "it, or leave it out"
        ) from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _jsonl(file: Path, field: str) -> Iterator[Document]:
    try:
        with _open_lines(file) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise FairyError(f"{file}, line {number} is not JSON: {error}") from error
                keys = sorted(entry) if isinstance(entry, dict) else []
                if field not in keys or not isinstance(entry[field], str):
                    there = f" but {json.dumps(entry[field]):.40}" if field in keys else ""
                    raise FairyError(
                        f"{file}, line {number} has no text under {field!r}{there}; it has "
                        f"{', '.join(keys) or 'no keys'}; choose one with --text-field"
                    )
                yield iter((entry[field],))
    except UnicodeDecodeError as error:
        raise FairyError(f"{file} is not UTF-8 text: {error.reason}; convert it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FairyError(f"{file} is not a whole gzip file: {error}; download it again") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _open_lines(file: Path) -> Any:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise FairyError(
            f"reading {file} needs pyarrow; install it with pip install 'fairy_compile[train]'"
        ) from error
    return pyarrow


def _arrow(file: Path, field: str) -> Iterator[str | None]:
    """Yield a column of an Arrow stream, what the datasets library keeps in its cache."""
    pyarrow = _pyarrow(file)
    try:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
            _check_column(str(file), field, stream.schema.names)
            for batch in stream:
                yield from batch.column(field).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise FairyError(f"{file} is not a readable Arrow stream: {error}") from error


def _parquet(file: Path, field: str) -> Iterator[str | None]:
    ArrowInvalid = _pyarrow(file).ArrowInvalid
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise FairyError(f"{file} is not a readable parquet file: {error}") from error
    _check_column(str(file), field, table.schema_arrow.names)
    for batch in table.iter_batches(columns=[field]):
        yield from batch.column(0).to_pylist()


def _saved_dataset(directory: Path, field: str, split: str) -> Iterator[str | None]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise FairyError(
            f"reading {directory} needs datasets; install it with "
            "pip install 'fairy_compile[train]'"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(directory))
    except Exception as error:  # of many kinds
        raise FairyError(
            f"the dataset {directory} cannot be loaded: {error}; save it again with save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise FairyError(
                f"the dataset {directory} has the splits {', '.join(loaded)}, none called "
                f"{split!r}; give the directory of one of them"
            )
        loaded = loaded[split]
    _check_column(str(directory), field, loaded.column_names)
    for entry in loaded.select_columns([field]):
        yield entry[field]


def _check_column(what: str, field: str, names: list[str]) -> None:
    if field not in names:
        raise FairyError(
            f"{what} has no column {field!r}; it has {', '.join(names)}; choose one with "
            "--text-field"
        )
