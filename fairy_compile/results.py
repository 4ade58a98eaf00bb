"""Results of measurements: tables as text, plain data, and files that appear whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)"""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Show nothing."""


def to_plain(value: Any) -> Any:
    """Return a dataclass as dictionaries and lists; parts with a ``to_json`` use it."""
    if is_dataclass(value):
        return {f.name: _part(getattr(value, f.name)) for f in fields(value)}
    return value


def _part(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, (tuple, list)):
        return [_part(item) for item in value]
    return to_plain(value)


def markdown_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str]
) -> str:
    """Return a Markdown table; columns titled in ``numbers`` are aligned to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["--:" if title in numbers else ":--" for title in titles]
    return "\n".join([line(titles), line(rule), *map(line, rows)])


def aligned_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str]
) -> str:
    """Return a table in columns; those titled in ``numbers`` are aligned to the right."""
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if title in numbers else cell.ljust(width)
            for cell, width, title in zip(cells, widths, titles, strict=True)
        ).rstrip()

    return "\n".join([line(titles), line(["-" * width for width in widths]), *map(line, rows)])


def bullets(lines: Sequence[str], form: str) -> str:
    """Return lines, as a list where ``form`` is ``md``."""
    return "\n".join(f"- {line}" for line in lines) if form == "md" else "\n".join(lines)


def result_paths(
    directory: Path, name: str, *, endings: Sequence[str] = ("json", "md"), force: bool
) -> list[Path]:
    """Return the files `save_files` will write; call it before the measurement, not after.

    Raises:
        FairyError: ``name`` is no plain file name, a file is there and ``force`` is not given, or
            ``directory`` cannot be written.
    """
    if not re.fullmatch(r"[\w][\w.+-]{0,120}", name):
        raise FairyError(
            f"--name is {name!r}; allowed: letters, digits and _ . + - (at most 121, not first a "
            "sign)"
        )
    paths = [directory / f"{name}.{ending}" for ending in endings]
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise FairyError(f"{there[0]} exists; give another --name, or --force to replace it")
    check_directory("--results", directory)
    return paths


def check_directory(option: str, directory: Path) -> None:
    """Check that files can be written into ``directory``, which need not exist yet.

    Raises:
        FairyError: they cannot; the message names ``option``.
    """
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    if not existing.is_dir():
        raise FairyError(f"{option} {directory}: {existing} is a file; name a directory")
    if not os.access(existing, os.W_OK):
        raise FairyError(
            f"{option} {directory}: {existing} cannot be written; name another directory"
        )


def file_name(model: str) -> str:
    """Return a plain file name for the results of ``model``."""
    return re.sub(r"[^\w.+-]+", "-", model).strip("-.")[:80] or "model"


def save_files(paths: Sequence[Path], write: Callable[[Path], None]) -> None:
    """Make ``paths`` with ``write``, which gets another path to write; each appears whole.

    Raises:
        FairyError: a file cannot be written.
    """
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
            try:
                write(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise FairyError(f"cannot write the results: {error}") from error
