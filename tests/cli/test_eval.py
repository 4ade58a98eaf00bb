from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return path


def test_table_on_stdout_and_files_on_request(cli, artifact, text, tmp_path):
    options = ["--data", text, "--context", 64, "--against", artifact[0], "--results", tmp_path]
    result = cli("eval", artifact[0], *options)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] == ["model", "backend"]
    assert lines[2].startswith("tiny llama w2")
    assert "against" in result.stdout
    assert "KL(reference || model)" in result.stdout
    assert "wrote" in result.stderr
    saved = json.loads((tmp_path / "tiny-eval.json").read_text())
    assert saved["against"]["kl"]["mean"] == 0
    assert saved["context"] == saved["stride"] == 64
    assert (tmp_path / "tiny-eval.md").read_text().startswith("| model |")
    again = cli("eval", artifact[0], *options)
    assert again.exit_code == 2
    assert "tiny-eval.json exists" in again.stderr


def test_json_of_a_sliding_window(cli, artifact, text):
    options = ["--data", text, "--context", 32, "--stride", 8, "--max-tokens", 100, "--json"]
    found = json.loads(cli("eval", artifact[0], *options).stdout)
    assert found["scored"] == 99
    assert found["text"]["truncated"]
    assert found["against"] is None
    assert found["score"]["perplexity"]["mean"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --data PATH and --tasks LIST"),
        (["--data", "x", "--tasks", "y"], "give one of --data PATH and --tasks LIST"),
        (["--data", "nothing.txt"], "there is no data"),
        (["--data", "{text}", "--context", "4096"], "--context is 4096 tokens"),
        (["--data", "{text}", "--context", "8", "--stride", "9"], "--stride is 9 tokens"),
        (["--data", "{text}", "-o", "csv"], "unknown --output-format 'csv'"),
        (["--data", "{text}", "--limit", "3"], "--limit goes with --tasks"),
        (["--data", "{text}", "--against", "nowhere"], "no model 'nowhere'"),
        (
            ["--data", "{text}", "--against-device", "cpu"],
            "--against-device cpu goes with --against",
        ),
        (
            ["--data", "{text}", "--against", "{artifact}", "--against-device", "cuda"],
            "tiny is an artifact; leave it out",
        ),
        (["--tasks", "x", "--stride", "3"], "--stride goes with --data"),
        (["--tasks", "x", "--text-field", "body"], "--text-field goes with --data"),
        (["--data", "{text}", "--name", "a"], "--name goes with --results; leave it out, or"),
        (["--data", "{text}", "--force"], "--force goes with --results; leave it out, or"),
        (["--data", "{text}", "--results", "x", "--name", "a/b"], "--name is 'a/b'"),
    ],
)
def test_mistakes_are_one_line(cli, artifact, text, options, message):
    result = cli("eval", artifact[0], *_filled(options, text, artifact[0]))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def _filled(options, text, artifact):
    return [option.format(text=text, artifact=artifact) for option in options]


def test_not_an_artifact(cli, checkpoint, text):
    result = cli("eval", checkpoint, "--data", text)
    assert result.exit_code == 2
    assert "has no fairy.json" in result.stderr


def test_without_lm_eval_the_pip_command_is_named(cli, artifact, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli("eval", artifact[0], "--tasks", "hellaswag")
    assert result.exit_code == 2
    assert 'pip install "fairy-compile[eval]"' in result.stderr
