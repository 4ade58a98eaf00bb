"""``fairy_compile serve``: an OpenAI-compatible server, or a web page with the model in it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.errors import FairyError

# Optional[] and not "| None": typer reads these annotations at run time.
Number = Optional[int]  # noqa: UP045
Text = Optional[str]  # noqa: UP045
Directory = Optional[Path]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045


class Batching(str, Enum):
    """How many sequences one decode call runs."""

    exact = "exact"
    full = "full"


def serve(
    context_of_call: typer.Context,
    directory: options.Artifact,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 for any free one.")] = 8000,
    api_key: Annotated[
        Text,
        typer.Option(
            "--api-key",
            envvar="FAIRY_COMPILE_API_KEY",
            help="Ask clients for this key; the variable keeps it out of process lists.",
        ),
    ] = None,
    model_name: Annotated[
        Text, typer.Option("--model-name", help="What clients call it  [default: name of DIR]")
    ] = None,
    max_sequences: Annotated[
        Number, typer.Option("--max-sequences", help="Most at a time  [default: as built]")
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Most requests that wait; more get status 429.")
    ] = 64,
    max_body: Annotated[int, typer.Option("--max-body", help="Most bytes of a request's body.")] = 4
    << 20,
    batching: Annotated[
        Batching,
        typer.Option(
            "--batching",
            help="exact: no answer depends on what runs beside it; full: the largest batches.",
        ),
    ] = Batching.exact,
    reuse: Annotated[
        bool,
        typer.Option(
            "--prefix-reuse/--no-prefix-reuse",
            help="Do not run again what a prompt shares with one before it.",
        ),
    ] = True,
    allow_host: Annotated[
        Texts,
        typer.Option(
            "--allow-host", metavar="NAME", help="Also answer to this name; may be repeated, * any."
        ),
    ] = None,
    kv_tokens: Annotated[
        Number,
        typer.Option("--kv-tokens", help="Tokens of the KV cache  [default: 8192 or one context]"),
    ] = None,
    prefill_chunk: Annotated[
        Number,
        typer.Option("--prefill-chunk", help="Prompt tokens a step, others wait  [default: 256]"),
    ] = None,
    drain_seconds: Annotated[
        int, typer.Option("--drain-seconds", help="Time for running answers at the end.")
    ] = 30,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
    device: options.Device = None,
    threads: options.Threads = None,
    cpus: options.Cpus = None,
    context: options.Context = None,
    web: Annotated[
        bool,
        typer.Option(
            "--web",
            help="Serve a page that runs the model, built for webgpu, in the browser instead.",
            rich_help_panel="Page",
        ),
    ] = False,
    page: Annotated[
        Directory,
        typer.Option(
            "--page",
            help="Directory with an index.html  [default: a chat page]",
            rich_help_panel="Page",
        ),
    ] = None,
    web_llm: Annotated[
        Directory,
        typer.Option(
            "--web-llm",
            help="Directory of the npm package @mlc-ai/web-llm.",
            rich_help_panel="Page",
        ),
    ] = None,
    allow_origin: Annotated[
        Texts,
        typer.Option(
            "--allow-origin",
            help="Origin whose pages may read the model's files; may be repeated.",
            rich_help_panel="Page",
        ),
    ] = None,
) -> None:
    """Serve a compiled model to OpenAI's clients, or with --web to browsers, until Ctrl-C."""
    from fairy_compile.serve import require_packages
    from fairy_compile.tvm_pair import check_tvm_pair

    _refuse_mixed(context_of_call, web)
    if web:
        require_packages("web")
        from fairy_compile.serve.web import WebOptions, serve_web

        serve_web(
            directory,
            WebOptions(
                host=host,
                port=port,
                page=page,
                web_llm=web_llm,
                allow_hosts=tuple(allow_host or ()),
                allow_origins=tuple(allow_origin or ()),
                access_log=access_log,
            ),
            announce=lambda line: typer.echo(line, err=True),
        )
        return
    require_packages()
    check_tvm_pair()
    from fairy_compile.runtime.cpus import parse_cpus
    from fairy_compile.serve.server import MOST_SEQUENCES, ServerOptions
    from fairy_compile.serve.server import serve as run_server

    run_server(
        directory,
        ServerOptions(
            host=host,
            port=port,
            model_name=model_name,
            api_key=api_key,
            max_queue=max_queue,
            max_body=max_body,
            invariant=batching is Batching.exact,
            drain_seconds=drain_seconds,
            access_log=access_log,
            reuse=reuse,
            allowed_hosts=tuple(allow_host or ()),
        ),
        announce=lambda line: typer.echo(line, err=True),
        device=device,
        threads=threads,
        cpus=parse_cpus(cpus) if cpus else None,
        max_sequences=MOST_SEQUENCES if max_sequences is None else max_sequences,
        context=context,
        kv_tokens=kv_tokens,
        prefill_chunk=prefill_chunk,
    )


_PAGE_ONLY = frozenset({"page", "web_llm", "allow_origin"})
_BOTH = frozenset({"directory", "host", "port", "allow_host", "access_log", "web"})


def _refuse_mixed(call: typer.Context, web: bool) -> None:
    """Refuse options that mean nothing with, or without, ``--web``."""
    for name in call.params:
        source = call.get_parameter_source(name)
        if name in _BOTH or source is None or source.name != "COMMANDLINE":
            continue
        if web and name not in _PAGE_ONLY:
            raise FairyError(f"{_flag(name)} means nothing with --web; leave it out")
        if not web and name in _PAGE_ONLY:
            raise FairyError(f"{_flag(name)} is for --web; add that, or leave it out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
