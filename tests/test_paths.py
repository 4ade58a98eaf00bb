"""Paths that are none are told as such, by every function that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile.documents import data_files
from fairy_compile.paths import as_path
from fairy_compile.targets import load_target
from fairy_compile.train import TrainConfig
from fairy_compile.tune.api import tune


def test_texts_and_paths_are_taken_with_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("it", "~/x") == tmp_path / "x"
    assert as_path("it", Path("a") / "b") == Path("a/b")
    assert as_path("it", "~nobody-has-this-name/x") == Path("~nobody-has-this-name/x")


@pytest.mark.parametrize("value", [None, 3, True, b"x", ["x"], {}, "a\0b"], ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        fc.load,
        fc.verify,
        fc.inspect,
        data_files,
        lambda value: fc.build(value, dry_run=True),
        lambda value: fc.convert(value, "out"),
        lambda value: fc.convert("model", value),
        lambda value: fc.evaluate(value, "text.txt"),
        lambda value: tune(value),
        lambda value: TrainConfig("model", "text", value).run_directory,
    ],
    ids=["load", "verify", "inspect", "data", "build", "convert", "convert to", "evaluate", "tune",
         "train"],
)  # fmt: skip
def test_what_is_no_path_is_refused(call, value):
    with pytest.raises(fc.FairyError, match=r"^the \w+ is .*; allowed: a path|is empty"):
        call(value)


def test_an_artifact_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for call in (fc.load, fc.verify, fc.inspect):
        with pytest.raises(fc.ModelFileError, match=f"{tmp_path}/artifact"):
            call("~/artifact")


@pytest.mark.parametrize("value", [None, 3, ["cpu"]], ids=repr)
def test_what_is_no_name_of_a_target_is_refused(value):
    with pytest.raises(fc.FairyError, match="unknown target"):
        load_target(value)
