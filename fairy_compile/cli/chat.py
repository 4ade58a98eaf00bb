"""``fairy_compile chat``: talk to a compiled model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.input import is_terminal, read_text
from fairy_compile.cli.output import write_text
from fairy_compile.errors import FairyError

if TYPE_CHECKING:
    from fairy_compile.runtime import ChatSession, Generation, Model

_HELP = "/reset forgets the conversation, /stats shows speed and kernels, /exit leaves"


def chat(
    directory: options.Artifact,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--system", help="System message, before the first turn."),
    ] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = None,
    threads: options.Threads = None,
    cpus: options.Cpus = None,
    context: options.Context = None,
) -> None:
    """Talk to a compiled model.

    One line is one message. Ctrl-C stops an answer, Ctrl-D leaves. Messages may come from a pipe.
    """
    from fairy_compile.tvm_pair import check_tvm_pair

    check_tvm_pair()
    from fairy_compile.runtime import load_language_model
    from fairy_compile.runtime.cpus import parse_cpus

    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    with load_language_model(
        directory,
        device,
        threads=threads,
        cpus=parse_cpus(cpus) if cpus else None,
        max_sequences=1,
        context=context,
    ) as model:
        model.override(**sampling)  # a wrong value ends here, not at the first message
        for warning in model.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if model.template.note:
            typer.echo(f"note: {model.template.note}", err=True)
        session = model.chat_session(system)
        interactive = is_terminal()
        if interactive:
            typer.echo(_HELP, err=True)
        for message in _messages(interactive):
            if message.startswith("/"):
                if not _command(message, model, session):
                    break
                continue
            try:
                _answer(session.send(message, max_tokens, stop=stop or (), **sampling))
            except FairyError as error:
                if not interactive:
                    raise
                typer.echo(f"error: {error}", err=True)


def _messages(interactive: bool) -> Iterator[str]:
    """Yield the user's lines that are not empty, until the input ends."""
    if interactive:
        with suppress(ImportError):  # line editing and history, where Python has it
            import readline  # noqa: F401
    while sys.stdin is not None:
        try:
            line = read_text(partial(input, "> ") if interactive else sys.stdin.readline)
        except FairyError as error:
            if not interactive:
                raise
            typer.echo(f"error: {error}", err=True)
            continue
        except EOFError:  # Ctrl-D
            typer.echo("")
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            typer.echo("\n(Ctrl-D or /exit leaves)", err=True)
            continue
        if not interactive and not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _command(line: str, model: Model, session: ChatSession) -> bool:
    """Obey a line that begins with a slash; False to leave."""
    command = line.strip()
    if command == "/exit":
        return False
    if command == "/reset":
        session.reset()
        typer.echo("(a new conversation)", err=True)
    elif command == "/stats":
        typer.echo(model.stats().summary(), err=True)
    else:
        typer.echo(f"unknown command {command}: {_HELP}", err=True)
    return True


def _answer(generation: Generation) -> None:
    """Print an answer as it comes; Ctrl-C ends it after the step that is running."""
    with _interrupt_flag() as interrupted:
        for piece in generation:
            write_text(piece)
            if interrupted:
                generation.close()
    write_text("\n")
    if interrupted:
        typer.echo("(stopped)", err=True)
    elif generation.finish_reason == "context":
        typer.echo("(the context is full: /reset starts a new conversation)", err=True)
    elif generation.finish_reason == "length":
        typer.echo("(cut at --max-tokens)", err=True)


@contextmanager
def _interrupt_flag() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list; the second one interrupts at once.

    An exception at any point of the engine's work could leave its KV cache half-way between two
    states; a flag that is looked at between two steps cannot.
    """
    received: list[int] = []

    def on_interrupt(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
