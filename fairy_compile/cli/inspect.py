"""``fairy_compile inspect``: what is inside an artifact or a packed checkpoint."""

from __future__ import annotations

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json


def inspect(directory: options.Artifact, json: options.Json = False) -> None:
    """Show what an artifact or packed checkpoint holds."""
    from fairy_compile.artifact import inspect as inspect_directory
    from fairy_compile.artifact import render

    inspection = inspect_directory(directory)
    if json:
        print_json(inspection.to_json())
        return
    from rich.console import Console

    console = Console()
    render(inspection, console if console.is_terminal else Console(width=240))
