"""What every HTTP request passes: counting, API key, size of the body."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fairy_compile.serve.api_error import ApiError

if TYPE_CHECKING:
    from fairy_compile.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health",)
"""Paths that need no API key: what watches a server has none."""


def error_response(error: ApiError) -> JSONResponse:
    """Return ``error`` as a response."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


class Counting:
    """Counts requests by path and status; unknown paths share a label."""

    def __init__(self, app: App, metrics: Metrics, paths: Collection[str]):
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http.labels(path, str(message["status"])).inc()
            await send(message)

        return await self._app(scope, receive, counted)


def wrong_host(host: str) -> JSONResponse:
    """Return the answer to a request for another host, for `hosts.HostCheck`."""
    return error_response(
        ApiError(
            403,
            f"this server does not answer to the name {host[:100]!r}; use its address, or start "
            "it with --allow-host NAME",
            code="wrong_host",
        )
    )


class ApiKey:
    """Refuses requests without ``Authorization: Bearer KEY``."""

    def __init__(self, app: App, key: str):
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                refusal = ApiError(
                    401,
                    "wrong or missing API key; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return await error_response(refusal)(scope, receive, send)
        return await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes, announced or not."""

    def __init__(self, app: App, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        message = f"the body is larger than {self._limit} bytes, which this server takes"
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdigit() or int(announced) > self._limit:
            return await error_response(ApiError(413, message))(scope, receive, send)
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            part = await receive()
            if part["type"] == "http.request":
                seen += len(part.get("body", b""))
                if seen > self._limit:
                    raise HTTPException(413, message)
            return part

        return await self._app(scope, limited, send)
