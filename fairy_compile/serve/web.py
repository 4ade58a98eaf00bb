"""Serving a page that runs a model in the browser, with WebLLM (extra ``web``).

Nothing is computed here: the page, WebLLM's JavaScript and the artifact's files are handed out, all
from one origin, so that no page of another can read them. Paths:

    /                                                  the page
    /models.json                                       WebLLM's ``model_list``, and which to load
    /models/NAME/VERSION/resolve/main/FILE             the artifact, where WebLLM looks for it
    /web-llm/FILE                                      the npm package's ``lib`` directory

VERSION changes with the artifact, since browsers keep its files under their URL for good.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fairy_compile.artifact import Manifest, verify
from fairy_compile.artifact.manifest import MANIFEST
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.paths import as_path
from fairy_compile.serve.hosts import HostCheck, OwnNames
from fairy_compile.serve.listener import is_loopback, listen, url
from fairy_compile.serve.middleware import App, Message, Receive, Send
from fairy_compile.targets import data_directory
from fairy_compile.user_cache import cache_directory

WEB_LLM = "@mlc-ai/web-llm"
WEB_LLM_VERSION = "0.2.86"
"""The version that is tested."""

_MEDIA_TYPES = {
    ".bin": "application/octet-stream",
    ".css": "text/css",
    ".html": "text/html",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".json": "application/json",
    ".map": "application/json",
    ".mjs": "text/javascript",
    ".model": "application/octet-stream",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".wasm": "application/wasm",
}
# WebLLM compiles WebAssembly, and brings some along as data URLs.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self' data: blob:; "
    "img-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class WebOptions:
    """How a page is served.

    Attributes:
        host: address to listen at; the default lets only this machine in.
        port: 0 for any free one.
        page: directory with an ``index.html``; default the chat page that comes along.
        web_llm: directory of the npm package; default where `find_web_llm` looks.
        allow_hosts: host names to answer to besides this machine's own.
        allow_origins: origins whose pages may read the files, e.g. ``https://example.org``.
        access_log: log every request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    page: Path | None = None
    web_llm: Path | None = None
    allow_hosts: Sequence[str] = ()
    allow_origins: Sequence[str] = ()
    access_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise FairyError(f"port is {self.port}; allowed: 0 to 65535")
        for origin in self.allow_origins:
            parts = urlsplit(origin)
            plain = f"{parts.scheme}://{parts.netloc}"
            if parts.scheme not in ("http", "https") or not parts.netloc or plain != origin:
                raise FairyError(
                    f"--allow-origin {origin} is no origin; give it like https://example.org"
                )


def serve_web(
    directory: Path | str,
    options: WebOptions | None = None,
    *,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve an artifact built for browsers, and a page, until Ctrl-C.

    Args:
        directory: the artifact.
        options: default `WebOptions`.
        announce: called with lines for the user.

    Raises:
        FairyError: the artifact is damaged or not for browsers, WebLLM is not installed, or the
            address is taken.
    """
    options = options or WebOptions()
    listener = listen(options.host, options.port)
    with closing(listener):
        address = listener.getsockname()[0]
        app = create_web_app(directory, options, address)
        if not is_loopback(address):
            announce(
                f"warning: {address} can be reached from other machines; browsers offer WebGPU to "
                "pages of http:// addresses only on the machine itself"
            )
        name = Path(directory).resolve().name
        # Browsers trust this name like https, where they may not trust the address.
        shown = url(listener).replace("127.0.0.1", "localhost").replace("[::1]", "localhost")
        announce(f"serving {name} at {shown}: open it in a browser with WebGPU")
        config = uvicorn.Config(
            app,
            log_level="info" if options.access_log else "warning",
            access_log=options.access_log,
            lifespan="off",
        )
        with suppress(KeyboardInterrupt):  # uvicorn has ended, and passes the signal on
            uvicorn.Server(config).run(sockets=[listener])
    announce("stopped")


def create_web_app(directory: Path | str, options: WebOptions, address: str) -> Starlette:
    """Return the application that serves a page and an artifact.

    Args:
        directory: the artifact.
        options: see `WebOptions`; ``host`` and ``port`` only count as a name.
        address: the IP address it will listen at.
    """
    directory = as_path("the artifact", directory)
    manifest = verify(directory).manifest
    if manifest.target.device != "webgpu":
        raise UnsupportedError(
            f"{directory} was built for {manifest.target.name}, which browsers cannot run; build "
            "it with --target webgpu, or webgpu-f32 for browsers without 16-bit floats"
        )
    page = _page_directory(options.page)
    record = model_record(directory, manifest)
    answer = {"model_list": [record], "model_id": record["model_id"]}

    async def models(_: Request) -> Response:
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    files = _ArtifactFiles(directory, [*manifest.files, MANIFEST])
    middleware = [
        Middleware(HostCheck, names=OwnNames(address, (options.host, *options.allow_hosts))),
        Middleware(_SafetyHeaders, shared=bool(options.allow_origins)),
    ]
    if options.allow_origins:
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(options.allow_origins)))
    return Starlette(
        routes=[
            Route("/models.json", models),
            Mount(record["model"].rstrip("/") + "/resolve/main", files),
            Mount("/web-llm", _Files(find_web_llm(options.web_llm, page) / "lib")),
            Mount("/", _Files(page, html=True)),
        ],
        middleware=middleware,
    )


def model_record(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Return an artifact's entry of WebLLM's ``model_list``, with URLs relative to the origin."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", directory.resolve().name)
    version = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()[:12]
    base = f"/models/{name}/{version}/"
    parameters = sum(file.bytes for file in manifest.files.values())
    return {
        "model": base,
        "model_id": name,
        "model_lib": f"{base}resolve/main/{manifest.library}",
        "required_features": ["shader-f16"] if "float16" in manifest.target.features else [],
        "vram_required_MB": round(parameters / 1e6, 1),
    }


def find_web_llm(given: Path | None, page: Path) -> Path:
    """Return the directory of the npm package `WEB_LLM`.

    Looked for where ``given`` says, or below the page's ``node_modules``, or in the user's cache.

    Raises:
        FairyError: it is not there.
    """
    home = cache_directory() / "web"
    places = [given] if given else [root / "node_modules" / WEB_LLM for root in (page, home)]
    for place in places:
        if (place / "lib" / "index.js").is_file():
            return place
    raise FairyError(
        f"the npm package {WEB_LLM} is not in {' or '.join(map(str, places))}; install it with: "
        f"npm install --prefix {home} {WEB_LLM}@{WEB_LLM_VERSION}"
    )


def _page_directory(given: Path | None) -> Path:
    page = given or data_directory("web", source="examples/web")
    if not (page / "index.html").is_file():
        raise FairyError(f"--page {page} has no index.html; give a directory with one")
    return page


class _Files(StaticFiles):
    """Files of a directory, with media types that do not depend on the machine.

    Hidden files and links that lead out of the directory are not found.
    """

    def __init__(self, directory: Path, html: bool = False) -> None:
        super().__init__(directory=directory, html=html)

    def get_path(self, scope: Message) -> str:
        """Return the path below the directory."""
        path = super().get_path(scope)
        if any(part.startswith(".") and part != "." for part in path.split(os.sep)):
            raise HTTPException(404)
        return path

    def file_response(self, full_path: Any, *args: Any, **kwargs: Any) -> Response:
        """Return the response with a file."""
        response = super().file_response(full_path, *args, **kwargs)
        kind = _MEDIA_TYPES.get(Path(full_path).suffix.lower(), "application/octet-stream")
        response.headers["content-type"] = (
            f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        )
        return response


class _ArtifactFiles(_Files):
    """Those files of a directory that an artifact lists."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        super().__init__(directory)
        self._names = frozenset(names)

    def get_path(self, scope: Message) -> str:
        """Return the path below the directory."""
        path = super().get_path(scope)
        if path.replace(os.sep, "/") not in self._names:
            raise HTTPException(404)
        return path


class _SafetyHeaders:
    """Keeps pages of other origins from embedding what is served, and browsers from guessing."""

    def __init__(self, app: App, shared: bool) -> None:
        self._app = app
        self._headers = [
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"content-security-policy", _CONTENT_SECURITY_POLICY.encode()),
        ]
        if not shared:
            self._headers.append((b"cross-origin-resource-policy", b"same-origin"))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        return await self._app(scope, receive, with_headers)
