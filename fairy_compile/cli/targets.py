"""``fairy_compile targets``: what models can be compiled for, and which models."""

from __future__ import annotations

from typing import Annotated

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json

Models = Annotated[
    bool, typer.Option("--models", help="List the model families instead, by model_type.")
]


def targets(models: Models = False, json: options.Json = False) -> None:
    """List the targets models can be compiled for, or the families of models."""
    from fairy_compile.tvm_pair import check_tvm_pair

    check_tvm_pair()  # features of this machine's CPU are read through TVM
    if models:
        _list_models(json)
        return
    from fairy_compile.targets import load_target, target_names

    found = [load_target(name) for name in target_names()]
    if json:
        print_json(
            [
                {
                    "name": target.name,
                    "description": target.description,
                    "device": target.device,
                    "library": target.library,
                    "kernels": list(target.kernels),
                    "features": sorted(target.features),
                    "runs_here": target.runs_here(),
                }
                for target in found
            ]
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "runs here", "description", "kernels, best first")
    for target in found:
        runs = "yes" if target.runs_here() else "no"
        table.add_row(target.name, runs, target.description, ", ".join(target.kernels))
    console = Console()
    (console if console.is_terminal else Console(width=240)).print(table)


def _list_models(json: bool) -> None:
    from fairy_compile.models import FAMILIES

    found = [
        {"model_type": name, "description": (family.__doc__ or "").strip().splitlines()[0]}
        for name, family in sorted(FAMILIES.items())
    ]
    if json:
        print_json(found)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("model_type in config.json", "family")
    for row in found:
        table.add_row(row["model_type"], escape(row["description"]))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
