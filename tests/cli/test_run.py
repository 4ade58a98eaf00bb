import json
import re
import sys

import pytest

from fairy_compile import FairyError
from fairy_compile.cli.run import run


def test_text_on_stdout_and_statistics_on_stderr(cli, artifact):
    greedy = ["--max-tokens", "12", "--temperature", "0"]
    result = cli("run", artifact[0], "--prompt", "def f(", *greedy)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert re.search(r"decode 11 tokens at [\d.]+ tok/s", result.stderr)
    assert result.stderr.count("\n") == 1
    assert cli("run", artifact[0], "--prompt", "def f(", "--no-stream", *greedy).stdout == (
        result.stdout
    )
    report = json.loads(cli("run", artifact[0], "-p", "def f(", "--json", *greedy).stdout)
    assert report["text"] + "\n" == result.stdout
    assert report["finish_reason"] == "length"
    assert len(report["tokens"]) == 12
    kernels = {k["kernel"]: k for k in report["stats"]["kernels"] if k["batch"] == "single"}
    assert sum(k["calls"] for k in kernels.values()) == 11 * 5  # qkv, o, gate_up, down, head


def test_prompt_from_a_pipe_and_seeds(cli, artifact):
    def text(seed):
        arguments = ["run", artifact[0], "--seed", seed, "--temperature", "1", "--max-tokens", "20"]
        return cli(*arguments, stdin="hello").stdout

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0; allowed: 0 to 100"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--context", "1000"], "context is 1000 tokens"),
        (["--threads", "0"], "threads is 0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_mistakes_are_one_line(cli, artifact, options, message):
    result = cli("run", artifact[0], "-p", "x", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_prompt_longer_than_the_context_names_both_numbers(cli, artifact):
    result = cli("run", artifact[0], "-p", "x" * 500)
    assert result.exit_code == 2
    assert "500 tokens, but the context holds 128" in result.stderr


def test_stdin_that_is_no_text(cli, artifact):
    result = cli("run", artifact[0], stdin=b"x\xff")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: stdin is not utf-8 text: invalid start byte at byte 1; convert it\n"
    )


def test_stdin_that_is_closed(artifact, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FairyError, match="run needs a prompt; give it with --prompt"):
        run(artifact[0])


def test_not_an_artifact(cli, checkpoint):
    result = cli("run", checkpoint, "-p", "x")
    assert result.exit_code == 2
    assert "has no fairy.json" in result.stderr


def test_reported_kernels_are_the_ones_that_run(artifact):
    from fairy_compile import load

    with load(artifact[0], max_sequences=1) as model:
        measured = model.trace_kernels([5, 6, 7])
        model.generate([5, 6, 7], 2, temperature=0.0)  # one prefill, one decode
        stats = model.stats()
    assert sum(count for name, count in measured.items() if "phase_gemm" in name) == 5
    for batch in ("single", "many"):
        reported = {k.kernel: k.calls for k in stats.kernels if k.batch == batch}
        # Two prefills: one for the trace; the traced step itself is not counted.
        assert sum(reported.values()) == 5 * (1 if batch == "single" else 2)


def test_an_artifact_for_a_better_processor_is_refused(cli, artifact, monkeypatch):
    monkeypatch.setattr("fairy_compile.targets.host_features", lambda: frozenset({"sse2"}))
    result = cli("run", artifact[0], "-p", "x")
    assert result.exit_code == 2
    assert "built for target cpu, whose instructions this machine lacks: " in result.stderr


def test_a_library_that_describes_itself_otherwise_is_refused(artifact, monkeypatch):
    from fairy_compile import ModelFileError, load
    from fairy_compile.runtime.library import ModelLibrary

    opened = ModelLibrary.__init__

    def other_metadata(self, path, device):
        opened(self, path, device)
        self.metadata["params"] = self.metadata["params"][::-1]

    monkeypatch.setattr(ModelLibrary, "__init__", other_metadata)
    with pytest.raises(ModelFileError, match="reports another 'params'"):
        load(artifact[0])
