"""``fairy_compile eval``: perplexity, distance to another model, tasks of lm-eval."""

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
Number = Optional[int]  # noqa: UP045
Text = Optional[str]  # noqa: UP045
Place = Optional[Path]  # noqa: UP045


def eval(
    directory: options.Artifact,
    data: options.Data = None,
    context: Annotated[
        Number,
        typer.Option("--context", help="Tokens a window  [default: the model's, 2048 max]"),
    ] = None,
    stride: Annotated[
        Number,
        typer.Option("--stride", help="From window to window  [default: --context: disjoint]"),
    ] = None,
    max_tokens: Annotated[
        Number, typer.Option("--max-tokens", help="Most tokens of text to use  [default: all]")
    ] = None,
    against: Annotated[
        Text,
        typer.Option(
            "--against",
            metavar="OTHER",
            help="Compare with this artifact, Hugging Face directory or packed checkpoint.",
        ),
    ] = None,
    against_device: Annotated[
        Text,
        typer.Option("--against-device", help="PyTorch device of OTHER  [default: cpu]"),
    ] = None,
    split: Annotated[
        Text,
        typer.Option("--split", help="test, validation or train  [default: the first there is]"),
    ] = None,
    text_field: options.DataField = "text",
    join: Annotated[
        Text, typer.Option("--join", help="Text between documents  [default: a blank line]")
    ] = None,
    tasks: Annotated[
        Text,
        typer.Option("--tasks", metavar="LIST", help="Tasks of lm-eval, separated by commas."),
    ] = None,
    num_fewshot: Annotated[
        Number, typer.Option("--num-fewshot", help="Examples before each question of a task.")
    ] = None,
    limit: Annotated[Number, typer.Option("--limit", help="Most examples a task.")] = None,
    include_path: Annotated[
        Place, typer.Option("--include-path", metavar="DIR", help="Further task files of lm-eval.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask the tasks' questions as in a chat.")
    ] = False,
    device: options.Device = None,
    threads: options.Threads = None,
    cpus: options.Cpus = None,
    output_format: Annotated[
        str, typer.Option("-o", "--output-format", help="table, md or json.")
    ] = "table",
    json: options.Json = False,
    results: Annotated[
        Place, typer.Option("--results", metavar="DIR", help="Also write JSON and Markdown.")
    ] = None,
    name: options.ResultsName = None,
    force: options.ReplaceResults = False,
) -> None:
    """Measure how good a compiled model is: perplexity on --data, or --tasks of lm-eval.

    Windows of --data are disjoint as in the papers unless --stride is given.
    """
    from fairy_compile.evaluation.tables import FORMATS, render
    from fairy_compile.results import file_name, result_paths, save_files
    from fairy_compile.runtime.cpus import parse_cpus
    from fairy_compile.tvm_pair import check_tvm_pair

    form = "json" if json else output_format
    check_choice("--output-format", form, FORMATS)
    options.check_results(results, name, force)
    if (data is None) == (tasks is None):
        raise FairyError("eval needs text or tasks: give one of --data PATH and --tasks LIST")
    check_tvm_pair()
    from fairy_compile.artifact.manifest import Manifest

    source = Manifest.load(directory).source.name
    paths = []
    if results is not None:
        paths = result_paths(results, name or f"{file_name(source)}-eval", force=force)
    running = {
        "context": context,
        "device": device,
        "threads": threads,
        "cpus": parse_cpus(cpus) if cpus else None,
        "command": shlex.join(["fairy_compile", *sys.argv[1:]]),
    }
    if tasks is not None:
        _refuse(
            "--data",
            {
                "--against": against is not None,
                "--against-device": against_device is not None,
                "--stride": stride is not None,
                "--max-tokens": max_tokens is not None,
                "--split": split is not None,
                "--text-field": text_field != "text",
                "--join": join is not None,
            },
        )
        from fairy_compile.evaluation.tasks import evaluate_tasks

        result = evaluate_tasks(
            directory,
            [task for task in tasks.split(",") if task],
            num_fewshot=num_fewshot,
            limit=limit,
            include_path=include_path,
            apply_chat_template=chat_template,
            **running,
        )
    else:
        _refuse(
            "--tasks",
            {
                "--num-fewshot": num_fewshot is not None,
                "--limit": limit is not None,
                "--include-path": include_path is not None,
                "--chat-template": chat_template,
            },
        )
        from fairy_compile.evaluation import evaluate
        from fairy_compile.evaluation.text import DEFAULT_JOIN

        with progress_bar() as progress:
            result = evaluate(
                directory,
                data,
                stride=stride,
                max_tokens=max_tokens,
                against=against,
                against_device=against_device,
                text_field=text_field,
                split=split,
                join=DEFAULT_JOIN if join is None else join,
                progress=progress,
                **running,
            )
    typer.echo(render(result, form))
    if paths:

        def write(path: Path) -> None:
            path.write_text(render(result, path.suffix[1:]) + "\n", encoding="utf-8")

        save_files(paths, write)
        typer.echo(f"wrote {', '.join(map(str, paths))}", err=True)


def _refuse(goes_with: str, given: dict[str, bool]) -> None:
    """Refuse options of the other way to evaluate, which would be ignored."""
    for option, is_given in given.items():
        if is_given:
            raise FairyError(f"{option} goes with {goes_with}; leave it out, or give {goes_with}")
