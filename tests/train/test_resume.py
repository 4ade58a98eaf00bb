"""Killed runs go on where they were, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.frontends import open_source
from fairy_compile.train import TrainConfig, train
from fairy_compile.train.metrics import MetricsLog, read_metrics
from fairy_compile.train.rundir import last_checkpoint

STEPS = 60


def command(model, text, output, *more):
    options = {"steps": STEPS, "block": 32, "batch": 4, "lr": 3e-3, "log-every": 2}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return [
        *(sys.executable, "-m", "fairy_compile.cli", "train", str(model), "--data", str(text)),
        *("-o", str(output), "--save-every", "6", "--cpu", *flags, *more),
    ]


def environment():
    root = str(Path(fc.__file__).parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def run(arguments):
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


def same_result(one, other):
    first, second = read_metrics(one / "metrics.csv"), read_metrics(other / "metrics.csv")
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        pairs = [(a[key], b[key]) for a, b in zip(first, second, strict=True) if a[key] is not None]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-6)
    a, b = open_source(one / "latents"), open_source(other / "latents")
    for name in a.names():
        np.testing.assert_allclose(a.dense(name), b.dense(name), rtol=1e-5, atol=1e-7)


def test_killed_run_ends_like_an_uninterrupted_one(config, model, text, tmp_path):
    train(config(output=str(tmp_path / "whole"), steps=STEPS, save_every=6))
    arguments = command(model, text, tmp_path / "killed")
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    directory = tmp_path / "killed.run"
    deadline = time.monotonic() + 120
    while not (directory / "checkpoint-12" / "complete").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(fc.FairyError, match="another process trains"):
        train(config(output=str(tmp_path / "killed"), steps=STEPS))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    resumed = run([*arguments, "--json"])
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_from"] >= 12
    same_result(tmp_path / "whole", tmp_path / "killed")
    assert not directory.exists()


def test_half_written_checkpoints_are_not_resumed_from(tmp_path):
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()


def test_metrics_after_the_checkpoint_are_written_anew(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": 1 / step, "seconds": step / 2})
    log.close()
    log = MetricsLog(tmp_path, 4)
    assert log.seconds == 2
    log.write({"step": 6, "eval_loss": 0.5})
    log.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"], row["eval_loss"]) for row in rows] == [
        (2, 0.5, None),
        (4, 0.25, None),
        (6, None, 0.5),
    ]


def test_interrupted_finished_and_forced_runs(config, text, tmp_path, monkeypatch):
    from fairy_compile.train import run as run_module

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "export", broken)
    with pytest.raises(KeyboardInterrupt):
        train(config(steps=2))
    monkeypatch.undo()
    assert (tmp_path / "out.run" / "checkpoint-2").is_dir()
    stat = text.stat()
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(fc.FairyError, match="changed since the run"):
        train(config(steps=2))
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert train(config(steps=2)).resumed_from == 2
    train(config(steps=2), force=True, keep_run=True)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(fc.FairyError, match="seed: 0 there, 1 now"):
        train(config(steps=2, seed=1))
    other = fc.QuantConfig("w1", scale="row", exempt=("lm_head",))
    words = (
        r"\(quant: 'w2' there, 'w1' now, scale: 'tensor' there, 'row' now, "
        r"exempt: \[\] there, \['lm_head'\] now\)"
    )
    with pytest.raises(fc.FairyError, match=words):
        train(config(steps=2, quant=other))
    assert train(config(steps=2, seed=1), force=True).resumed_from == 0


@pytest.fixture(scope="module")
def finished_run(model, text, tmp_path_factory):
    """A run directory with two checkpoints, and the settings of its run."""
    output = tmp_path_factory.mktemp("damage") / "out"
    settings = TrainConfig(
        str(model),
        str(text),
        str(output),
        steps=2,
        block=32,
        batch=4,
        save_every=1,
        log_every=1,
        cpu=True,
    )
    train(settings, keep_run=True)
    shutil.rmtree(output)
    return settings


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("checkpoint-2/model.safetensors", b"x" * 30, "model.safetensors is 30 bytes"),
        ("checkpoint-2/optimizer.pt", None, "optimizer.pt is missing"),
        ("checkpoint-2/rng_state.pth", None, "rng_state.pth is missing"),
        ("checkpoint-2/model.safetensors", ..., "model.safetensors|header"),
        ("checkpoint-2/optimizer.pt", ..., "zip|[Ww]eights"),
        ("checkpoint-2/scheduler.pt", ..., "zip|[Ww]eights"),
        ("checkpoint-2/rng_state.pth", ..., "zip|[Ww]eights"),
        ("checkpoint-2/trainer_state.json", ..., "codec|Expecting|column"),
        ("checkpoint-2/config.json", ..., "codec|Expecting|column"),
        ("checkpoint-2/complete", b"[1]", "damaged"),
        ("train.tokens.json", b"\xff", "train.tokens.json is missing or damaged"),
        ("metrics.csv", b"step,loss\n\xff,1\n", "metrics.csv is damaged"),
    ],
)
def test_damaged_run_directories_are_refused(finished_run, tmp_path, name, content, words):
    settings = dataclasses.replace(finished_run, output=str(tmp_path / "out"))
    shutil.copytree(finished_run.run_directory, settings.run_directory)
    path = settings.run_directory / name
    if content is None:
        path.unlink()
    else:  # ...: as many bytes as were written, but others
        path.write_bytes(b"\xff" * path.stat().st_size if content is ... else content)
    way_out = "remove .*checkpoint-2 to go on from checkpoint-1" if "check" in name else "remove"
    with pytest.raises(fc.FairyError, match=f"(?s)({words}).*{way_out}"):
        train(settings)
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_sizes_and_lost_tokens_do_no_harm(finished_run, tmp_path):
    settings = dataclasses.replace(finished_run, output=str(tmp_path / "out"))
    shutil.copytree(finished_run.run_directory, settings.run_directory)
    (settings.run_directory / "checkpoint-2" / "complete").write_bytes(b"")  # earlier versions
    (settings.run_directory / "train.tokens").write_bytes(b"\0" * 8)
    assert train(settings).resumed_from == 2


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return run([*launcher, "--standalone", *map(str, arguments)])


@pytest.mark.slow  # processes that import torch, and start process groups
def test_two_processes_take_the_steps_of_one_with_twice_the_passes(model, text, tmp_path):
    done = torchrun(*command(model, text, tmp_path / "two")[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    alone = run(command(model, text, tmp_path / "one", "--accumulate", "2"))
    assert alone.returncode == 0, alone.stderr
    same_steps(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow  # as above
def test_sharded_training_is_killed_and_goes_on(model, text, tmp_path):
    script = Path(__file__).with_name("sharded_on_cpu.py")
    settings = (model, text, tmp_path / "sharded", STEPS)
    killed = torchrun(script, *settings, 12)
    assert killed.returncode != 0
    assert (tmp_path / "sharded.run" / "checkpoint-12" / "complete").exists()
    done = torchrun(script, *settings, 0)
    assert done.returncode == 0, done.stderr
    assert "sharded weights: True" in done.stdout
    assert "resumed from 12" in done.stdout
    alone = run(command(model, text, tmp_path / "one", "--accumulate", "2"))
    assert alone.returncode == 0, alone.stderr
    same_steps(tmp_path / "sharded", tmp_path / "one")
    packed = open_source(tmp_path / "sharded")
    latents = open_source(tmp_path / "sharded" / "latents")
    for name in packed.layers:
        stored, again = (source.phase(name, packed.quant) for source in (packed, latents))
        assert np.array_equal(stored.codes, again.codes)


def same_steps(one, other):
    """Compare the first half of two loss curves.

    Summing gradients in another order moves them by 1e-7, AdamW turns that into steps of another
    sign where a gradient is nearly 0, and codes flip: later losses agree less.
    """
    first, second = (
        [row["loss"] for row in read_metrics(path / "metrics.csv") if row["loss"] is not None]
        for path in (one, other)
    )
    assert len(first) == len(second) == STEPS // 2
    np.testing.assert_allclose(first[:8], second[:8], rtol=1e-2)
