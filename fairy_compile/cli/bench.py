"""``fairy_compile bench``: tokens per second, alone or beside llama.cpp."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import progress_bar
from fairy_compile.config import check_choice
from fairy_compile.errors import FairyError

# Optional[] and not "| None": typer reads these annotations at run time.


def bench(
    directory: options.Artifact,
    n_prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", help="Prompt lengths to time; 0 for none.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("-n", "--n-gen", help="Tokens to generate and time; 0 for none.")
    ] = "128",
    depth: Annotated[
        str, typer.Option("-d", "--depth", help="Tokens already in the context.")
    ] = "0",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", help="Timed runs of each test.")
    ] = 5,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-t", "--threads", help="CPU threads  [default: one a core]"),
    ] = None,
    cpus: options.Cpus = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-b", "--batch", help="Most prompt tokens a call  [default: as built]"),
    ] = None,
    cooldown: Annotated[
        float, typer.Option("--cooldown", help="Seconds to rest before each timed run.")
    ] = 0.0,
    device: options.Device = None,
    output_format: Annotated[
        str, typer.Option("-o", "--output-format", help="table, md, json or csv.")
    ] = "table",
    json: options.Json = False,
    peer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--peer", help="Run in turns with this program: llama.cpp."),
    ] = None,
    peer_types: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--peer-types",
            help="Its weight types, separated by commas  [default: Q4_K_M,Q2_K,TQ2_0]",
        ),
    ] = None,
    peer_cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--peer-cache",
            metavar="DIR",
            help="Where its random models are kept  [default: the user's cache directory]",
        ),
    ] = None,
    results: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--results", metavar="DIR", help="Also write JSON, Markdown and a plot."),
    ] = None,
    name: options.ResultsName = None,
    force: options.ReplaceResults = False,
) -> None:
    """Measure speed by the conventions of llama-bench.

    pp512 is a prompt of 512 tokens, tg128 a generation of 128. Lengths may be lists: -p 128,512.
    """
    from fairy_compile.bench.tables import FORMATS, render
    from fairy_compile.bench.workload import Settings, parse_lengths
    from fairy_compile.runtime.cpus import parse_cpus
    from fairy_compile.tvm_pair import check_tvm_pair

    form = "json" if json else output_format
    check_choice("--output-format", form, FORMATS)
    for option, value in (("--peer-types", peer_types), ("--peer-cache", peer_cache)):
        if peer is None and value is not None:
            raise FairyError(f"{option} goes with --peer; leave it out, or give --peer llama.cpp")
    options.check_results(results, name, force)
    settings = Settings(
        n_prompt=parse_lengths("--n-prompt", n_prompt),
        n_gen=parse_lengths("--n-gen", n_gen),
        depth=parse_lengths("--depth", depth),
        repetitions=repetitions,
        threads=threads,
        cpus=parse_cpus(cpus) if cpus else None,
        batch=batch,
        cooldown=cooldown,
        device=device,
    )
    check_tvm_pair()
    paths = []
    if results is not None:
        from fairy_compile.artifact.manifest import Manifest
        from fairy_compile.bench.save import default_name, result_paths

        source = Manifest.load(directory).source.name
        stem = default_name(source, peer is not None) if name is None else name
        paths = result_paths(results, stem, comparison=peer is not None, force=force)
    command = shlex.join(["fairy_compile", *sys.argv[1:]])
    with progress_bar() as progress:
        if peer is None:
            from fairy_compile.bench.run import bench as measure

            result = measure(directory, settings, command=command, progress=progress)
        else:
            from fairy_compile.bench.compare import DEFAULT_TYPES, compare

            result = compare(
                directory,
                settings,
                peer=peer,
                types=DEFAULT_TYPES if peer_types is None else peer_types.split(","),
                cache=peer_cache,
                command=command,
                progress=progress,
            )
    typer.echo(render(result, form))
    if paths:
        from fairy_compile.bench.save import save

        save(result, paths)
        typer.echo(f"wrote {', '.join(map(str, paths))}", err=True)
