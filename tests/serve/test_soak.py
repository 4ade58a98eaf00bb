"""Many clients for minutes, and many connections at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

import fairy_compile as fc

from .conftest import MODEL, NAME
from .test_server import running

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"
CONNECTIONS = 1000

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["int8", "float"])
def wide(request, tmp_path_factory):
    """Return the bundled model compiled for 32 sequences."""
    out = tmp_path_factory.mktemp("wide") / request.param
    fc.build(MODEL, target="cpu", max_batch=32, act=request.param, output=out)
    return out


def test_32_clients_get_their_single_stream_answers_and_memory_stays(wide):
    pytest.importorskip("psutil", reason="psutil is not installed: pip install '.[test]'")
    seconds = 300 if wide.name == "int8" else 60
    command = [sys.executable, SCRIPT, wide, "--clients", 32, "--seconds", seconds, "--json"]
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False
    )
    result = json.loads(done.stdout)
    print(result)
    assert result["errors"] == []
    assert result["wrong"] == 0
    assert result["answers"] > 100
    assert abs(result["rss_growth"]) < 0.05


def test_a_thousand_connections_get_an_answer_or_429(artifact):
    body = {"model": NAME, "prompt": "x", "max_tokens": 20, "temperature": 0}

    async def ask(address, started):
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        started.append(writer)
        while len(started) < CONNECTIONS:  # all connections are open before the first request
            await asyncio.sleep(0.01)
        content = json.dumps(body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )
        reply = await reader.read()
        writer.close()
        head, _, rest = reply.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(rest)

    async def ask_all(address):
        started = []
        return await asyncio.gather(*(ask(address, started) for _ in range(CONNECTIONS)))

    resource = pytest.importorskip("resource", reason="needs POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * CONNECTIONS:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * CONNECTIONS), hard))
    try:
        with running(artifact) as (_, address):
            replies = asyncio.run(ask_all(address))
            assert httpx.get(f"{address}/health").json()["status"] == "ok"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    statuses = Counter(status for status, _ in replies)
    assert set(statuses) <= {200, 429}
    assert statuses[200] >= 12
    texts = {answer["choices"][0]["text"] for status, answer in replies if status == 200}
    assert len(texts) == 1
