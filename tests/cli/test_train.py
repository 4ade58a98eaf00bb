import json

import numpy as np
import pytest

from tests.torch_threads import one_thread  # noqa: F401


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def function(argument):\n    return argument + 1\n" * 60)
    return path


FLAGS = ("--steps", 4, "--block", 16, "--batch", 2, "--log-every", 2, "--cpu")


def test_train_then_inspect(cli, checkpoint, text, tmp_path):
    out = tmp_path / "ckpt"
    result = cli("train", checkpoint, "--data", text, "-o", out, "--layer-quant", "lm_head=w3",
                 *FLAGS)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "step 2/4  loss" in result.stderr
    assert "tok/s" in result.stderr
    assert "left" in result.stderr
    assert "trained 8 layers for 4 steps, 128 tokens" in result.stdout
    assert str(out / "latents") in result.stdout
    kind = json.loads(cli("inspect", out, "--json").stdout)
    assert kind["kind"] == "packed checkpoint"
    again = cli("train", checkpoint, "--data", text, "-o", out, *FLAGS)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    forced = cli("train", checkpoint, "--data", text, "-o", out, "--force", *FLAGS)
    assert forced.exit_code == 0, forced.stderr


def test_json_report(cli, checkpoint, text, tmp_path):
    result = cli("train", checkpoint, "--data", text, "-o", tmp_path / "c", "--json", *FLAGS)
    report = json.loads(result.stdout)
    assert report["steps"] == 4
    assert np.isfinite(report["loss"])
    assert report["prepared"]["quant"]["quant"] == "w2"


def test_dry_run_shows_the_layers_and_writes_nothing(cli, checkpoint, text, tmp_path):
    result = cli("train", checkpoint, "--data", text, "--dry-run", "--exempt", "lm_head")
    assert result.exit_code == 0, result.stderr
    assert "layers.0.mlp.down_proj" in result.stdout
    assert "exempt by pattern 'lm_head'" in result.stdout
    report = json.loads(cli("train", checkpoint, "--data", text, "--dry-run", "--json").stdout)
    assert len(report["layers"]) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--data PATH"),
        (("--data", "TEXT"), "-o DIR"),
        (("--data", "nowhere", "-o", "OUT"), "there is no data"),
        (("--data", "TEXT", "-o", "OUT", "--quant", "w9"), "allowed: w1, w2, w3, w4"),
        (("--data", "TEXT", "-o", "OUT", "--scale", "column"), "allowed: tensor, row, tile64"),
        (("--data", "TEXT", "-o", "OUT", "--layer-quant", "lm_head=3"), "such as lm_head=w3"),
        (("--data", "TEXT", "-o", "OUT", "--schedule", "linear"), "allowed: wsd"),
        (("--data", "TEXT", "-o", "OUT", "--fsdp", "--cpu"), "torchrun"),
        (("--data", "TEXT", "-o", "OUT", "--tokenizer", "EMPTY"), "has no tokenizer.json"),
    ],
)
def test_mistakes_end_in_one_line(cli, checkpoint, text, tmp_path, flags, words):
    (tmp_path / "empty").mkdir()
    places = {"TEXT": text, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    result = cli("train", checkpoint, *(places.get(flag, flag) for flag in flags))
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()
