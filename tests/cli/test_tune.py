"""`tune` from the command line: a tiny artifact, a few trials, a schedule that `build` reads."""

from __future__ import annotations

import json
import os

import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends import convert
from fairy_compile.targets import load_target, schedules_directory
from fairy_compile.tune.records import read_records
from fairy_compile.tune.tasks import tasks_of

FEW = ("--trials", "24", "--patience", "1", "--rows", "3", "--threads", "1", "--builders", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trials", "0"), "--trials is 0; allowed: 1 and more"),
        (("--rows", "many"), "write numbers, such as 4,128"),
        (("--rows", "0"), "from 1 to 4096"),
        (("--search", "luck"), "unknown --search 'luck'"),
        (("--rpc", "nowhere"), "write HOST:PORT"),
        (("--rpc", "127.0.0.1:9190"), "--rpc HOST:PORT and --key NAME go together"),
        (("--target", "rpi5", "--dry-run"), "was built for target cpu"),
        (("--quant", "w3", "--dry-run"), "whose codes and activations are as it was built"),
        (("--act", "int8"), "leave out --quant, --scale, --layer-quant, --act and --exempt"),
        (("--report", "-o", "/nonexistent"), "holds no run"),
    ],
)
def test_mistakes_are_told(cli, artifact, arguments, words):
    result = cli("tune", artifact[0], *arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (("--quant", "w2"), "--quant"),
        (("--scale", "tensor"), "--scale"),
        (("--layer-quant", "lm_head=w3"), "--layer-quant"),
        (("--act", "int16", "--quant", "w1", "--scale", "row"), None),
    ],
)
def test_other_codes_than_a_checkpoint_brings_are_refused(cli, checkpoint, tmp_path, options, flag):
    packed = tmp_path / "packed"
    convert(checkpoint, packed, quant=QuantConfig("w1", scale="row", method="phase"))
    result = cli("tune", packed, "--dry-run", *options)
    if flag is None:
        assert result.exit_code == 0
        assert "T=1 UW row int16" in result.output
        return
    assert result.exit_code == 2
    assert (
        f"brings its codes, of w1, scales per row, and does not take others; leave {flag} out"
        in (" ".join(result.output.split()))
    )
    asked = {"--quant": {"quant": "w3"}, "--scale": {"scale": "tile64"}}.get(flag)
    if asked:
        with pytest.raises(FairyError, match=f"leave {flag} out"):
            tasks_of(packed, load_target("cpu"), QuantConfig(**asked))


def test_a_target_that_does_not_run_here_is_told(cli, checkpoint, tmp_path):
    result = cli("tune", checkpoint, "--target", "arm64-linux", "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert "measure on a device that has one, with --rpc" in result.output


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    cli, artifact, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    for place, words in (("file", "is a file; name a directory"), ("new", "cannot be written")):
        monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
        result = cli("tune", artifact[0], "--schedules", tmp_path / place, "-o", tmp_path / "run")
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_tasks_of_artifact_and_model_agree(cli, artifact, checkpoint):
    lists = [cli("tune", model, "--dry-run", "--json") for model in (artifact[0], checkpoint)]
    of_artifact, of_model = (json.loads(result.output) for result in lists)
    # An artifact knows which knobs its weights demand, so it leaves fewer settings to try.
    settings = [[task.pop("settings") for task in tasks] for tasks in (of_artifact, of_model)]
    assert all(0 < fixed <= free for fixed, free in zip(*settings, strict=True))
    assert of_artifact == of_model
    assert {task["batch"] for task in of_artifact} == {"single", "many"}
    assert "nothing was measured" in cli("tune", checkpoint, "--dry-run").output


@pytest.mark.slow
def test_tune_then_build(cli, artifact, checkpoint, tmp_path, monkeypatch):
    run, schedules = tmp_path / "run", tmp_path / "schedules"
    options = (*FEW, "-o", run, "--schedules", schedules)
    done = cli("tune", artifact[0], *options, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    (schedule,) = schedules.glob("*.toml")
    records = read_records(schedule)
    assert len(records) == len({(t["task"], t["batch"]) for t in result["tasks"]})
    assert all(r.gain >= 1 and r.device for r in records)
    assert {p.name for p in run.iterdir()} == {"trials.jsonl", "report.html"}
    assert "<svg" in (run / "report.html").read_text()
    # Again, it has nothing left to do.
    again = json.loads(cli("tune", artifact[0], *options, "--json").output)
    assert again["resumed"]
    assert again["tasks"] == result["tasks"]
    report = cli("tune", artifact[0], *options, "--report")
    assert "which `build --target cpu` reads" in report.output
    # It tells where things are, of which it wrote only the page.
    words = " ".join(report.output.split())
    assert f"{schedule} holds this; copy its tables to {schedules_directory()}" in words
    assert words.count("wrote ") == 1
    elsewhere = cli("tune", artifact[0], *FEW, "-o", run, "--report").output
    assert "does not hold all of this; give --schedules DIR as the run had it" in elsewhere
    other = cli("tune", artifact[0], *options, "--seed", "1")
    assert other.exit_code == 2
    assert "other seed: 0" in other.output
    assert schedules_directory() != schedules
    monkeypatch.setattr("fairy_compile.compiler.schedules.schedules_directory", lambda: schedules)
    # Only a build that reads the weights knows what they demand of kernels, as an artifact does.
    built = json.loads(cli("build", checkpoint, "-o", tmp_path / "tuned", "--json").output)
    assert built["tuned"] == {"tuned": sum(built["tuned"].values())}
    assert any("have knobs tuned for them" in note for note in built["notes"])
