import csv
import io
import json

import pytest

QUICK = ["-p", "8", "-n", "4", "-r", "1"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr("fairy_compile.bench.run.default_bytes", lambda _: 1 << 20)


def test_table_on_stdout_and_files_on_request(cli, artifact, tmp_path):
    options = ["--results", tmp_path, "--name", "tiny"]
    result = cli("bench", artifact[0], *QUICK, *options)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split()[:6] == ["model", "size", "params", "backend", "threads", "test"]
    assert [line.split("  ")[0] for line in lines[2:4]] == ["tiny llama w2"] * 2
    assert "wrote" in result.stderr
    saved = json.loads((tmp_path / "tiny.json").read_text())
    assert [test["test"] for test in saved["tests"]] == ["pp8", "tg4"]
    assert (tmp_path / "tiny.md").read_text().startswith("| model |")
    again = cli("bench", artifact[0], *QUICK, *options)
    assert again.exit_code == 2
    assert "tiny.json exists" in again.stderr


def test_json_and_csv(cli, artifact):
    data = json.loads(cli("bench", artifact[0], *QUICK, "--json").stdout)
    assert len(data["model"]["manifest_sha256"]) == 64
    text = cli("bench", artifact[0], "-p", "0", "-n", "4,2", "-r", "1", "-o", "csv").stdout
    assert [row["test"] for row in csv.DictReader(io.StringIO(text))] == ["tg4", "tg2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "x"], "--n-prompt is 'x'; allowed: a whole number"),
        (["-p", "0", "-n", "0"], "nothing to run"),
        (["-r", "0"], "--repetitions is 0"),
        (["-o", "xml"], "unknown --output-format 'xml'; allowed: table, md, json, csv"),
        (["-p", "4096"], "context is 4096 tokens"),
        (["-p", "4096"], "for 1 to 128: give smaller ones, such as -p 128 -n 128"),
        (["-t", "0"], "threads is 0"),
        (["--peer", "ollama"], "unknown --peer 'ollama'"),
        (["--peer-types", "Q4_K_M"], "--peer-types goes with --peer"),
        (["--peer-cache", "x"], "--peer-cache goes with --peer; leave it out, or give --peer"),
        (["--name", "a"], "--name goes with --results; leave it out, or give --results DIR"),
        (["--force"], "--force goes with --results; leave it out, or give --results DIR"),
        (["--results", "x", "--name", "a/b"], "--name is 'a/b'"),
    ],
)
def test_mistakes_are_one_line(cli, artifact, options, message):
    result = cli("bench", artifact[0], *QUICK, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_missing_extra_names_the_pip_command(cli, artifact, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli("bench", artifact[0], *QUICK, "--peer", "llama.cpp")
    assert result.exit_code == 2
    assert 'pip install "fairy-compile[bench]"' in result.stderr


def test_not_an_artifact(cli, checkpoint):
    result = cli("bench", checkpoint, *QUICK)
    assert result.exit_code == 2
    assert "has no fairy.json" in result.stderr
