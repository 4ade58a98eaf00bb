"""Names the server answers to: pages of other sites must not reach it from a user's browser."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("starlette", reason="starlette is missing: pip install '.[serve]'")

from fairy_compile.serve.hosts import HostCheck, OwnNames
from fairy_compile.serve.middleware import wrong_host


def status(host: str | None, bound: str = "127.0.0.1", allowed: tuple[str, ...] = ()) -> int:
    """Send a request with the header Host and return the status of the answer."""
    statuses: list[int] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [] if host is None else [(b"host", host.encode())]
    scope = {"type": "http", "path": "/", "headers": headers}
    asyncio.run(HostCheck(app, OwnNames(bound, allowed), wrong_host)(scope, None, send))
    return statuses[0]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LOCALHOST", "localhost.", "[::1]:8000",
     "app.localhost:1", "127.1.2.3", None],
)  # fmt: skip
def test_loopback_names_are_answered(host):
    assert status(host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example:8000", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example",
     "192.168.1.7:8000", "[2001:db8::1]", "[", "notlocalhost"],
)  # fmt: skip
def test_other_names_are_refused(host):
    assert status(host) == 403


def test_the_address_listened_at_is_answered():
    assert status("192.168.1.7:8000", bound="192.168.1.7") == 200
    assert status("192.168.1.8:8000", bound="192.168.1.7") == 403
    assert status("Box.lan:80", bound="box.lan") == 200


@pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
def test_a_server_at_all_addresses_answers_to_addresses_and_no_names(bound):
    assert status("192.168.1.7:8000", bound) == 200
    assert status("[2001:db8::1]:8000", bound) == 200
    assert status("evil.example", bound) == 403


def test_more_names_can_be_allowed():
    assert status("gpu.lan:8000", "0.0.0.0", ("GPU.lan",)) == 200
    assert status("evil.example", "0.0.0.0", ("gpu.lan",)) == 403
    assert status("evil.example", "127.0.0.1", ("*",)) == 200
