"""``fairy_compile verify``: is this artifact whole and well formed?"""

from __future__ import annotations

from typing import Annotated

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json


def verify(
    directory: options.Artifact,
    json: options.Json = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not compare the SHA-256 of every file.")
    ] = False,
) -> None:
    """Check an artifact: structure, sizes, hashes, values.

    The model library in it is code: verifying shows that it is the one the manifest names, not
    that it is harmless.
    """
    from fairy_compile.artifact import human_bytes
    from fairy_compile.artifact import verify as verify_artifact

    report = verify_artifact(directory, hashes=not quick)
    if json:
        print_json(report.to_json())
        return
    for warning in report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(
        f"{directory} is good: {report.files} files, {human_bytes(report.bytes)}, "
        f"{report.tensors} tensors" + ("" if report.hashed else "; hashes not compared")
    )
