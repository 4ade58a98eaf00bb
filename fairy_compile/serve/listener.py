"""Sockets to listen at."""

from __future__ import annotations

import errno
import ipaddress
import socket

from fairy_compile.errors import FairyError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address.

    Raises:
        FairyError: the address is taken, not allowed, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise FairyError(f"there is no address {host!r}: {error.strerror or error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise FairyError(
                f"port {port} of {host} is in use; choose another with --port, or 0 for any"
            ) from error
        raise FairyError(f"cannot listen at {host} port {port}: {error.strerror}") from error
    return listener


def is_loopback(host: str) -> bool:
    """Tell whether an address, which may name a zone, is one of this machine alone."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """Return the address of a bound socket as the beginning of a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
