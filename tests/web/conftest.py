"""Headless Chromium on artifacts for browsers; what is missing skips the tests, with the reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fairy_compile.codegen.zig import zig_command
from fairy_compile.user_cache import cache_directory

TOOLS = "FAIRY_COMPILE_WEB_TOOLS"
"""Environment variable: where `make web-tools` installed the npm packages, if not in the cache."""
_DRIVE = Path(__file__).with_name("drive.mjs")
# Shaders are compiled for a CPU; on a busy machine that takes many minutes.
_BROWSER_SECONDS = 2400


@pytest.fixture(scope="session")
def tools() -> Path:
    """Return the directory with ``node_modules``."""
    if zig_command() is None:
        pytest.skip('needs: pip install "fairy-compile[web]"')
    for program in ("chromium", "node"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} on the path: apt-get install chromium nodejs npm")
    place = Path(os.environ.get(TOOLS) or cache_directory() / "web")
    for package in ("@mlc-ai/web-llm", "playwright-core"):
        if not (place / "node_modules" / package / "package.json").is_file():
            pytest.skip(f"needs the npm package {package} in {place}: make web-tools")
    return place


@contextmanager
def served(directory: Path, tools: Path, page: Path | None) -> Iterator[str]:
    """Serve an artifact by the command line and yield its URL; Ctrl-C ends it quietly."""
    package = tools / "node_modules" / "@mlc-ai" / "web-llm"
    command = [sys.executable, "-m", "fairy_compile.cli", "serve", str(directory), "--web"]
    command += ["--port", "0", "--web-llm", str(package)]
    command += ["--page", str(page)] if page else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = server.stderr.readline()
            assert line.startswith("serving "), line + server.stderr.read()
            yield line.split(" at ")[1].split(": ")[0]
        finally:
            server.send_signal(signal.SIGINT)
            rest = server.communicate(timeout=60)[1]
    assert (server.returncode, rest) == (0, "stopped\n")


@pytest.fixture
def browse(tools: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """Return browse(artifact, steps, page): run steps of `drive.mjs`, return their results."""

    def run(directory: Path, steps: list[tuple[str, Any]], page: Path | None = None) -> list[Any]:
        job = tmp_path / "steps.json"
        with served(directory, tools, page) as url:
            facts = {
                "tools": str(tools),
                "chromium": shutil.which("chromium"),
                "profile": str(tmp_path / "profile"),
                "url": url,
                "steps": steps,
            }
            job.write_text(json.dumps(facts))
            done = subprocess.run(
                ["node", str(_DRIVE), str(job)],
                stdout=subprocess.PIPE,
                text=True,
                timeout=_BROWSER_SECONDS,
                check=True,
            )
        output = json.loads(done.stdout)
        errors = [line for line in output["console"] if line.startswith("error:")]
        assert errors == []
        return output["results"]

    return run
