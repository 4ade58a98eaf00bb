"""The program: start, end, and the mistakes of its users."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import openai
import pytest
from typer.testing import CliRunner

from fairy_compile.cli import app

from .test_answers import NO_END

COMMAND = [sys.executable, "-m", "fairy_compile.cli", "serve"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


@contextmanager
def running(*arguments):
    """Start the program and yield (process, address)."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if found := re.search(r"at (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("it did not start")
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_sigterm_lets_running_answers_end(artifact):
    with running(artifact, "--model-name", "m", "--max-sequences", 2) as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="m", prompt="x", max_tokens=600, stream=True, logit_bias=NO_END
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices[0].finish_reason is None
        assert rest[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        output = process.stderr.read()
    assert "stopped" in output
    assert "Traceback" not in output
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_answers_beyond_the_time_to_drain_are_cut_off(artifact):
    options = ("--model-name", "m", "--drain-seconds", 0)
    with running(artifact, *options) as (process, address):
        body = {"model": "m", "prompt": "x", "max_tokens": 1000, "stream": True, "n": 4}
        body["logit_bias"] = NO_END
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as reply:
            pieces = reply.iter_text()
            text = next(pieces)
            process.send_signal(signal.SIGINT)
            text += "".join(pieces)
        assert "the server is shutting down" in text
        assert "[DONE]" not in text
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke(tmp_path / "no-model", "--port", port)
    assert result.exit_code == 2
    assert f"port {port} of 127.0.0.1 is in use" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "no.such.host.invalid"], "there is no address"),
        (["--host", "203.0.113.7"], "cannot listen at 203.0.113.7"),
        (["--max-queue", "-1"], "max_queue is -1; allowed: 0"),
        (["--port", "70000"], "port is 70000"),
        (["--api-key", ""], "API key is empty"),
        (["--batching", "none"], "exact"),
        ([], "has no fairy.json; name a directory that `fairy_compile build` wrote"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(tmp_path, arguments, message):
    result = invoke(tmp_path, "--port", 0, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_cache_smaller_than_the_context_is_refused(artifact):
    result = invoke(artifact, "--port", 0, "--kv-tokens", 64)
    assert result.exit_code == 2
    assert "KV cache holds 64 tokens, but the context 1024" in result.stderr


def test_the_missing_extra_is_named_with_its_command(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert "uvicorn" in result.stderr
    assert "pip install 'fairy-compile[serve]'" in result.stderr
