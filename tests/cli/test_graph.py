"""ONNX files on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fairy_compile.cli import app
from tests.tiny_graphs import mlp_onnx


def fairy(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, str]:
    directory = tmp_path_factory.mktemp("cli")
    path = mlp_onnx(directory / "mlp.onnx")
    result = fairy("build", path, "--target", "cpu", "--quant", "w2", "-o", directory / "out")
    assert result.exit_code == 0, result.output
    return path, directory / "out", result.output


def test_build_reports_every_layer(built) -> None:
    _, out, output = built
    for words in ("fc1", "fc2", "fc3", "odd dimension 7", "onnx graph", str(out)):
        assert words in output


def test_inspect_and_verify(built) -> None:
    _, out, _ = built
    shown = json.loads(fairy("inspect", out, "--json").output)
    assert shown["kind"] == "graph artifact"
    assert [row["name"] for row in shown["layers"]] == ["fc1", "fc2", "fc3"]
    assert "is good" in fairy("verify", out).output


@pytest.mark.parametrize(
    "verb", [("run", "-p", "x"), ("chat",), ("bench",), ("eval", "--data", __file__)]
)
def test_text_verbs_point_to_python(built, verb) -> None:
    _, out, _ = built
    name, *options = verb
    result = fairy(name, out, *options)
    assert result.exit_code == 2
    assert ".run(inputs)" in result.output


def test_dry_run_as_json(built) -> None:
    path, _, _ = built
    report = json.loads(fairy("build", path, "--dry-run", "--json", "--exempt", "fc1").output)
    assert [layer["stages"] for layer in report["layers"]] == [0, 2, 0]


def test_errors_are_one_line(tmp_path: Path) -> None:
    capitals = mlp_onnx(tmp_path / "M.ONNX")
    assert fairy("build", capitals, "-o", tmp_path / "out", "--dry-run").exit_code == 0
    assert "is an ONNX file" in fairy("convert", capitals, "-o", tmp_path / "out").output
    result = fairy("build", tmp_path / "nothing.onnx", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "there is no file" in result.output
    result = fairy("build", mlp_onnx(tmp_path / "m.onnx"), "--context", 4, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--context is for language models" in result.output
