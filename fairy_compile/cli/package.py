"""``fairy_compile package``: an artifact becomes what MLC's phone apps link and bundle."""

from __future__ import annotations

import shlex
from enum import Enum
from typing import Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json
from fairy_compile.errors import FairyError


class Phone(str, Enum):
    """What kind of phone the app is for."""

    ios = "ios"
    android = "android"


def package(
    directory: options.Artifact,
    platform: Annotated[Phone, typer.Option("--for", help="What kind of phone the app is for.")],
    output: options.Output = None,
    model_id: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model-id", help="Name of the model in the app  [default: name of DIR]"),
    ] = None,
    archive: Annotated[
        bool, typer.Option("--archive", help="Also write the library as a static one, libNAME.a.")
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write what MLC's iOS and Android apps take: objects, weights, mlc-package-config.json."""
    from fairy_compile.artifact import human_bytes
    from fairy_compile.artifact.package import PACKAGE_CONFIG
    from fairy_compile.artifact.package import package as write_package

    if output is None:
        raise FairyError("package needs a place for the package; give it with -o DIR")
    report = write_package(
        directory, platform.value, output, model_id=model_id, archive=archive, force=force
    )
    if json:
        print_json(report.to_json())
        return
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"wrote {report.output}, {human_bytes(report.bytes)}: {report.model_id} with the library "
        f"system://{report.model_lib}"
    )
    typer.echo(
        f"next, on the machine that builds the app: cd {shlex.quote(str(report.output))} && "
        f"mlc_llm package --package-config {PACKAGE_CONFIG} --output APP/dist"
    )
