"""``fairy_compile run``: continue one prompt."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.input import is_terminal, read_text
from fairy_compile.cli.output import print_json, write_text
from fairy_compile.errors import FairyError


def run(
    directory: options.Artifact,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("-p", "--prompt", help="Text to continue  [default: what stdin holds]"),
    ] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes.")
    ] = True,
    json: options.Json = False,
    device: options.Device = None,
    threads: options.Threads = None,
    cpus: options.Cpus = None,
    context: options.Context = None,
) -> None:
    """Continue a prompt with a compiled model.

    The text goes to stdout, a line of statistics to stderr.
    """
    if prompt is None:
        if sys.stdin is None or is_terminal():
            raise FairyError("run needs a prompt; give it with --prompt TEXT or on stdin")
        prompt = read_text(sys.stdin.read)
    from fairy_compile.tvm_pair import check_tvm_pair

    check_tvm_pair()
    from fairy_compile.runtime import load_language_model
    from fairy_compile.runtime.cpus import parse_cpus

    with load_language_model(
        directory,
        device,
        threads=threads,
        cpus=parse_cpus(cpus) if cpus else None,
        max_sequences=1,
        context=context,
    ) as model:
        for warning in model.warnings:
            typer.echo(f"warning: {warning}", err=True)
        generation = model.generate(
            prompt,
            max_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop or (),
            stream=True,
        )
        if json:
            generation.read()
        else:
            if stream:
                for piece in generation:
                    write_text(piece)
            else:
                write_text(generation.read())
            write_text("\n")
        stats = model.stats()
        if json:
            print_json(
                {
                    "text": generation.text,
                    "tokens": generation.tokens,
                    "finish_reason": generation.finish_reason,
                    "stats": stats.to_json(),
                }
            )
        else:
            typer.echo(stats.summary(), err=True)
