"""The command line: ``fairy_compile VERB ...``, one thin file a verb.

Verbs import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

try:
    import typer

    from fairy_compile.cli.bench import bench
    from fairy_compile.cli.build import build
    from fairy_compile.cli.chat import chat
    from fairy_compile.cli.convert import convert
    from fairy_compile.cli.evaluate import eval
    from fairy_compile.cli.guard import EXIT_INTERRUPTED, guarded, set_debug
    from fairy_compile.cli.inspect import inspect
    from fairy_compile.cli.package import package
    from fairy_compile.cli.run import run
    from fairy_compile.cli.serve import serve
    from fairy_compile.cli.targets import targets
    from fairy_compile.cli.train import train
    from fairy_compile.cli.tune import tune
    from fairy_compile.cli.verify import verify
except KeyboardInterrupt:  # Ctrl-C at once; `guard`, which tells later ones, is not there yet
    sys.stderr.write("interrupted\n")
    sys.exit(130)

VERBS = (
    build, convert, run, chat, serve, bench, eval, inspect, verify, package, tune, train, targets
)  # fmt: skip

app = typer.Typer(
    name="fairy_compile",
    help="Compile Fairy2i and iFairy language models (2-bit complex phase codes) and run them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would triple the time of --help
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _verb in VERBS:
    app.command()(guarded(_verb))


def _print_version(wanted: bool) -> None:
    if wanted:
        from fairy_compile import __version__

        typer.echo(f"fairy_compile {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of errors; before the verb.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    set_debug(debug)


def main() -> None:
    """Entry point of the console scripts."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; a file opened later must not take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console without Unicode shows "?" for the rest
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="fairy_compile")  # whatever it was started as
    except KeyboardInterrupt:  # before the verb began
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    finally:
        # What libraries do when the program ends takes a while; Ctrl-C then has nothing to tell.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(signal.SIGINT, signal.SIG_DFL)
