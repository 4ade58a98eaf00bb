"""Results files: NAME.json, NAME.md, and NAME.png of a comparison."""

from __future__ import annotations

from pathlib import Path

from fairy_compile import results
from fairy_compile.bench.result import BenchResult, Comparison
from fairy_compile.bench.tables import render


def result_paths(directory: Path, name: str, *, comparison: bool, force: bool) -> list[Path]:
    """Return the files `save` will write; see `results.result_paths`."""
    endings = ("json", "md", "png") if comparison else ("json", "md")
    return results.result_paths(directory, name, endings=endings, force=force)


def default_name(model: str, comparison: bool) -> str:
    """Return a file name for the results of ``model``."""
    plain = results.file_name(model)
    return f"{plain}-vs-llama.cpp" if comparison else plain


def save(result: BenchResult | Comparison, paths: list[Path]) -> None:
    """Write ``result`` to ``paths`` of `result_paths`; each file appears whole.

    Raises:
        FairyError: a file cannot be written.
    """
    results.save_files(paths, lambda path: _write(result, path))


def _write(result: BenchResult | Comparison, path: Path) -> None:
    if path.suffix == ".png":
        from fairy_compile.bench.plot import plot

        assert isinstance(result, Comparison)
        plot(result, path)
    else:
        path.write_text(render(result, path.suffix[1:]) + "\n", encoding="utf-8")
