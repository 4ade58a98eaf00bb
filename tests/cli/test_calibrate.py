"""`convert` and `build` with calibration text and budgets, as users type them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def function(argument):\n    return argument + 1\n" * 100)
    return path


def test_convert(cli, checkpoint, text, tmp_path):
    options = ("--calibrate", text, "--calibrate-tokens", "1024", "--calibrate-window", "64")
    result = cli("convert", checkpoint, "-o", tmp_path / "p", *options)
    assert result.exit_code == 0, result.stderr
    assert "output error" in result.stdout
    assert "weight error" in result.stdout
    assert "calibrated on 1,024 tokens" in result.stdout
    again = cli("convert", checkpoint, "-o", tmp_path / "q", *options, "--bits", "2.4", "--json")
    report = json.loads(again.stdout)
    assert report["bits_per_weight"] <= 2.4
    assert all(layer["loss"] is not None for layer in report["layers"])
    assert all(0 < layer["output_error"] < 1 for layer in report["layers"])


def test_budget_without_text(cli, checkpoint, tmp_path):
    result = cli("convert", checkpoint, "-o", tmp_path / "p", "--bits", "2.6")
    assert result.exit_code == 0, result.stderr
    assert "T by the budget of 2.6 bits (errors of weights)" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--calibrate-tokens", "64"), "--calibrate-tokens is given without text"),
        (("--calibrate-window", "64"), "--calibrate-window is given without text"),
        (("--text-field", "x"), "--text-field is given without text"),
        (("--method", "gptq"), "give some with --calibrate"),
        (("--bits", "7"), "allowed: 1.0"),
        (("--bits", "2.2", "--dry-run"), "dry run"),
        (("--calibrate", "missing.txt"), "there is no data"),
        (("--calibrate", "TEXT", "--calibrate-window", "1000"), "longer than the model's context"),
        (("--calibrate", "TEXT", "--method", "phase"), "looks at no calibration text"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "build"])
def test_mistakes(cli, checkpoint, text, tmp_path, verb, options, words):
    given = [text if option == "TEXT" else option for option in options]
    result = cli(verb, checkpoint, "-o", tmp_path / "p", *given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
