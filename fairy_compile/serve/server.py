"""Listening: from an artifact to a running server, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from fairy_compile.artifact.files import directory_name
from fairy_compile.errors import FairyError
from fairy_compile.paths import as_path
from fairy_compile.runtime import load_language_model
from fairy_compile.serve.app import DEFAULT_MAX_BODY, create_app
from fairy_compile.serve.listener import is_loopback, listen, url
from fairy_compile.serve.worker import EngineThread

if TYPE_CHECKING:
    from fairy_compile.runtime.model import Model

MOST_SEQUENCES = 1 << 10  # load_language_model() cuts this to what the model was built for
_FAREWELL_SECONDS = 5  # to send the last events
_CLOSE_SECONDS = 60.0  # one step of the engine is far shorter


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served.

    Attributes:
        host: address to listen at; the default lets only this machine in.
        port: 0 for any free one.
        model_name: what clients call the model; default the directory's name.
        api_key: asked of every request; None asks for none.
        max_queue: most requests that wait while all sequences are taken.
        max_body: most bytes of a request's body.
        invariant: split decode calls so that no answer depends on what runs beside it.
        drain_seconds: how long running answers may go on after the server was told to end.
        access_log: log every request.
        reuse: do not run again what a prompt shares with one before it.
        allowed_hosts: names the server answers to beside its address; ``*`` for any.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key: str | None = None
    max_queue: int = 64
    max_body: int = DEFAULT_MAX_BODY
    invariant: bool = True
    drain_seconds: int = 30
    access_log: bool = False
    reuse: bool = True
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_queue", 0, 1 << 20),
            ("max_body", 1 << 10, 1 << 30),
            ("drain_seconds", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise FairyError(f"{name} is {value}; allowed: {low} to {high}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise FairyError("the API key is empty or not ASCII; choose another")


def serve(
    directory: Path | str,
    options: ServerOptions | None = None,
    *,
    announce: Callable[[str], None] = print,
    **load_options: Any,
) -> None:
    """Serve an artifact until the process is told to end (SIGINT, SIGTERM).

    Then no more connections are taken, running answers get ``drain_seconds`` to end, and what is
    left is cut off with an error. A second signal cuts at once.

    Args:
        directory: the artifact.
        options: default `ServerOptions`.
        announce: called with lines for the user.
        load_options: of `fairy_compile.load`.

    Raises:
        FairyError: the address is taken, or what `fairy_compile.load` raises.
    """
    options = options or ServerOptions()
    directory = as_path("the artifact", directory)
    _raise_file_limit()
    # Before the model is loaded: that takes long, and two servers may not have one port.
    listener = listen(options.host, options.port)
    with contextlib.closing(listener):
        load_options.setdefault("max_sequences", MOST_SEQUENCES)
        engine = EngineThread(
            lambda: _load(directory, load_options),
            max_queue=options.max_queue,
            invariant=options.invariant,
            reuse=options.reuse,
        )
        try:
            name = options.model_name or directory_name(directory)
            _announce(announce, engine, options, name, listener)
            app = create_app(
                engine,
                name,
                api_key=options.api_key,
                max_body=options.max_body,
                host=options.host,
                allowed_hosts=options.allowed_hosts,
            )
            config = uvicorn.Config(
                app,
                log_level="info" if options.access_log else "warning",
                access_log=options.access_log,
                timeout_graceful_shutdown=options.drain_seconds + _FAREWELL_SECONDS,
                lifespan="off",
            )
            _Server(config, engine, options.drain_seconds).run(sockets=[listener])
        finally:
            engine.close(_CLOSE_SECONDS)
    announce("stopped")


def _load(directory: Path, options: dict[str, Any]) -> Model:
    model = load_language_model(directory, **options)
    cache, context = model.engine.cache, model.engine.context
    if cache.capacity < context:
        raise FairyError(
            f"the KV cache holds {cache.capacity} tokens, but the context {context}; give more "
            "--kv-tokens or a smaller --context"
        )
    return model


def _raise_file_limit() -> None:
    """Allow as many connections as the system lets this process have."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _announce(
    announce: Callable[[str], None],
    engine: EngineThread,
    options: ServerOptions,
    name: str,
    listener: socket.socket,
) -> None:
    model, rows = engine.model, engine.decode_rows
    sequences = model.engine.cache.max_sequences
    for warning in model.warnings:
        announce(f"warning: {warning}")
    if rows < sequences:
        announce(
            f"note: decode runs up to {rows} of {sequences} sequences a call: with more the "
            "kernels of this model round differently, and an answer would depend on what runs "
            "beside it; --batching full runs all together"
        )
    if model.template.note:
        announce(f"note: {model.template.note}")
    host = listener.getsockname()[0]
    if options.api_key is None and not is_loopback(host):
        announce(f"warning: {host} can be reached from other machines, and there is no --api-key")
    announce(
        f"serving {name} at {url(listener)}/v1: {sequences} sequences, "
        f"{model.engine.context} tokens of context, {model.engine.cache.capacity} of KV cache, "
        f"{model.engine.threads} thread{'s' if model.engine.threads > 1 else ''}"
    )


class _Server(uvicorn.Server):
    """Tells the engine to take no more when the end begins, and ends without a signal."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread, drain_seconds: int):
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._signals = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end; a second signal ends at once."""
        self._engine.drain()
        super().handle_exit(sig, frame)
        self.force_exit = self.force_exit or self._signals > 0
        self._signals += 1

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running answers, but not for ever."""
        asyncio.get_running_loop().call_later(self._drain_seconds, self._engine.abort)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; uvicorn would raise them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
