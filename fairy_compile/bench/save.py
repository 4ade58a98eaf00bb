"""Results files: NAME.json, NAME.md, and NAME.png of a comparison."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fairy_compile.bench.result import BenchResult, Comparison
from fairy_compile.bench.tables import render
from fairy_compile.errors import FairyError


def result_paths(directory: Path, name: str, *, comparison: bool, force: bool) -> list[Path]:
    """Return the files `save` will write; call it before the measurement, not after.

    Raises:
        FairyError: ``name`` is no plain file name, or a file is there and ``force`` is not given.
    """
    if not re.fullmatch(r"[\w][\w.+-]{0,120}", name):
        raise FairyError(
            f"--name is {name!r}; allowed: letters, digits and _ . + - (at most 121, not first a "
            "sign)"
        )
    endings = ("json", "md", "png") if comparison else ("json", "md")
    paths = [directory / f"{name}.{ending}" for ending in endings]
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise FairyError(f"{there[0]} exists; give another --name, or --force to replace it")
    return paths


def default_name(model: str, comparison: bool) -> str:
    """Return a file name for the results of ``model``."""
    plain = re.sub(r"[^\w.+-]+", "-", model).strip("-.")[:80] or "model"
    return f"{plain}-vs-llama.cpp" if comparison else plain


def save(result: BenchResult | Comparison, paths: list[Path]) -> None:
    """Write ``result`` to ``paths`` of `result_paths`; each file appears whole.

    Raises:
        FairyError: a file cannot be written.
    """
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
            try:
                _write(result, partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise FairyError(f"cannot write the results: {error}") from error


def _write(result: BenchResult | Comparison, path: Path) -> None:
    if path.suffix == ".png":
        from fairy_compile.bench.plot import plot

        assert isinstance(result, Comparison)
        plot(result, path)
    else:
        path.write_text(render(result, path.suffix[1:]) + "\n", encoding="utf-8")
