"""``fairy_compile targets``: what models can be compiled for."""

from __future__ import annotations

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json


def targets(json: options.Json = False) -> None:
    """List the targets models can be compiled for."""
    from fairy_compile.tvm_pair import check_tvm_pair

    check_tvm_pair()  # features of this machine's CPU are read through TVM
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
