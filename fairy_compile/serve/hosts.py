"""Which names a server answers to: a defence against DNS rebinding.

A page of another site can give its own name this machine's address, and then reads what a server
here answers as if it were its own. Browsers send the name they asked for in ``Host``, so a server
that answers to its own names alone gives such a page nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from fairy_compile.serve.listener import is_loopback
from fairy_compile.serve.middleware import App, Message, Receive, Send

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")


class OwnNames:
    """The names and addresses a server answers to.

    Loopback names always; if it listens where other machines reach it, also any IP address, which
    no other site can claim, and this machine's names.

    Args:
        address: what the server listens at, an IP address.
        more: further names, e.g. what ``--host`` said.
    """

    def __init__(self, address: str, more: Iterable[str] = ()) -> None:
        self._public = not is_loopback(address)
        own = (socket.gethostname(), socket.getfqdn()) if self._public else ()
        self._names = {"localhost", *(_plain(name) for name in (*own, *more))}

    def include(self, host: str) -> bool:
        """Tell whether ``host``, the text of a ``Host`` header, is one of them."""
        match = _HOST.fullmatch(host.lower())
        if not match:
            return False
        name = _plain(match[1])
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._names or name.endswith(".localhost")
        return self._public or address.is_loopback or name.strip("[]") in self._names


def _plain(name: str) -> str:
    return name.lower().rstrip(".")


class HostCheck:
    """Refuses requests to names that are not the server's own, with status 403."""

    def __init__(self, app: App, names: OwnNames):
        self._app, self._names = app, names

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] in ("http", "websocket"):
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) != 1 or not self._names.include(hosts[0]):
                refusal = PlainTextResponse(
                    "this server does not answer to that host name; --allow-host NAME adds one\n",
                    403,
                )
                return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)
