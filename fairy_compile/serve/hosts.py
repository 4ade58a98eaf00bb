"""Which names a server answers to: a defence against DNS rebinding.

A page of another site can give its own name this machine's address, and then reads what a server
here answers as if it were its own. Browsers send the name they asked for in ``Host``, so a server
that answers to its own names alone gives such a page nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response

from fairy_compile.serve.middleware import App, Message, Receive, Send

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")


class OwnNames:
    """The names and addresses a server answers to.

    Loopback names always, and the address it listens at. If other machines reach it, also this
    machine's names; if it listens at every address, any address, which no other site can claim.

    Args:
        address: what the server listens at, an address or a name.
        more: further names, e.g. what ``--host`` said; ``*`` for any.
    """

    def __init__(self, address: str, more: Iterable[str] = ()) -> None:
        parsed = _address(address)
        reached = parsed is not None and not parsed.is_loopback
        own = (socket.gethostname(), socket.getfqdn()) if reached else ()
        self._names = {"localhost", *(_plain(name) for name in (address, *own, *more))}
        self._any_address = parsed is not None and parsed.is_unspecified

    def include(self, host: str) -> bool:
        """Tell whether ``host``, the text of a ``Host`` header, is one of them."""
        if "*" in self._names:
            return True
        match = _HOST.fullmatch(host.lower())
        if not match:
            return False
        name = _plain(match[1].strip("[]"))
        address = _address(name)
        if address is None:
            return name in self._names or name.endswith(".localhost")
        return self._any_address or address.is_loopback or name in self._names


def _plain(name: str) -> str:
    return name.lower().rstrip(".")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _refusal(host: str) -> Response:
    return PlainTextResponse(
        "this server does not answer to that host name; --allow-host NAME adds one\n", 403
    )


class HostCheck:
    """Refuses requests to names that are not the server's own.

    Requests that name no host come from no browser, and are answered.

    Args:
        app: what to protect.
        names: that it answers to.
        refuse: text of the ``Host`` header -> the answer to other requests.
    """

    def __init__(
        self, app: App, names: OwnNames, refuse: Callable[[str], Response] = _refusal
    ) -> None:
        self._app, self._names, self._refuse = app, names, refuse

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] in ("http", "websocket"):
            hosts = Headers(scope=scope).getlist("host")
            if len(hosts) > 1 or not all(map(self._names.include, hosts)):
                return await self._refuse(hosts[-1])(scope, receive, send)
        return await self._app(scope, receive, send)
