"""llama.cpp as a runner of workloads, through llama-cpp-python in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fairy_compile.bench.workload import Workload, tokens
from fairy_compile.errors import FairyError

WORKER = "fairy_compile.bench.llama_cpp_worker"


def check_extra(modules: Iterable[str] = ("llama_cpp", "gguf", "matplotlib")) -> None:
    """Raise `FairyError` with the pip command unless the packages of extra ``bench`` are there."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise FairyError(
            f"--peer llama.cpp needs {', '.join(missing)}, which this Python lacks; run "
            'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install "fairy-compile[bench]"'
        )


class LlamaCppRunner:
    """A loaded GGUF file; same methods as `run.EngineRunner`. Use it as a context manager.

    Attributes:
        description: llama.cpp's name of the model.
        size_bytes: of its tensors.
        version: of llama-cpp-python.
        system: instruction sets llama.cpp reports to use.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, threads: int, context: int, batch: int | None
    ):
        """Start the process and load ``path``.

        Raises:
            FairyError: llama.cpp cannot load it, or crashed.
        """
        self._path = path
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed in close
        # The worker has to find this very package, however it came onto our path.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        try:
            facts = self._ask(
                path=str(path),
                threads=threads,
                context=context,
                batch=batch,
                tokens=tokens(vocab_size, context),
            )
        except BaseException:
            self.close()
            raise
        self.description = str(facts["description"])
        self.size_bytes = int(facts["size_bytes"])
        self.version = str(facts["version"])
        self.system = str(facts["system"])

    def __enter__(self) -> LlamaCppRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def run(self, workload: Workload) -> float:
        """Run ``workload`` and return the seconds of its timed part."""
        reply = self._ask(n_prompt=workload.n_prompt, n_gen=workload.n_gen, depth=workload.depth)
        return float(reply["seconds"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise FairyError(self._epitaph())
        return json.loads(line)

    def _epitaph(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        last = lines[-1] if lines else "no output"
        return (
            f"llama.cpp ended with {how} on {self._path.name}: {last}; delete that file if it was "
            "cut short, or build llama-cpp-python again with another compiler (CC=clang "
            "CXX=clang++)"
        )
