"""`convert --calibrate` as a whole: better outputs, resume, reports, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fairy_compile as fc  # noqa: E402
from fairy_compile.calibrate import Calibration, one_stage  # noqa: E402
from fairy_compile.calibrate import run as run_module  # noqa: E402
from fairy_compile.calibrate.windows import read_windows  # noqa: E402
from fairy_compile.errors import FairyError  # noqa: E402
from fairy_compile.frontends import convert, open_source  # noqa: E402
from tests.calibrate.conftest import WINDOW  # noqa: E402

SMALL = {"tokens": 32 * WINDOW, "window": WINDOW}


def calibration(text, **changes):
    return Calibration(str(text), **(SMALL | changes))


def files_of(directory):
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name != "calibration.json"  # holds times
    }


def test_outputs_are_nearer_than_without_text(checkpoint, reference, text, tmp_path):
    plain = convert(checkpoint, tmp_path / "plain")
    report = convert(checkpoint, tmp_path / "p", calibrate=calibration(text))
    assert "method gptq, with calibration text" in report.notes[0]
    assert "2,048 tokens" in report.notes[1]
    assert "peak memory" in report.notes[2]
    few = calibration(text, tokens=2 * WINDOW)
    notes = convert(checkpoint, tmp_path / "few", calibrate=few).notes
    assert any("128 tokens are few for layers with up to 160 inputs" in note for note in notes)
    assert {layer.stages for layer in report.layers if layer.name != "lm_head"} == {2}
    assert next(la for la in report.layers if la.name == "lm_head").stages == 3
    # Hidden states of the exact model through layers of both kinds, on other text of the sort.
    model = reference(checkpoint)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(text.read_text().split("\n"))))
    tokens = read_windows(checkpoint, calibration(other, tokens=8 * WINDOW))
    inputs: dict[str, torch.Tensor] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda m, a, n=name: inputs.__setitem__(n, a[0]))
    with torch.no_grad():
        model(torch.from_numpy(tokens.astype(np.int64)))
    for layer in report.layers:
        without = next(entry for entry in plain.layers if entry.name == layer.name)
        weight = linears[layer.name].weight.detach()
        error = {}
        for which in ("plain", "p"):
            near = torch.from_numpy(open_source(tmp_path / which).dense(f"{layer.name}.weight"))
            lost = inputs[layer.name] @ (weight - near).T
            error[which] = float(lost.square().sum())
        assert layer.output_error < layer.nmse
        assert (without.output_error, layer.loss) == (None, None)
        assert error["p"] < error["plain"], layer.name
    stored = json.loads((tmp_path / "p" / "calibration.json").read_text())["report"]
    assert [entry["output_error"] for entry in stored["layers"]] == [
        layer.output_error for layer in report.layers
    ]
    assert not (tmp_path / "p" / ".calibration").exists()


@pytest.mark.parametrize("kept", ["none", "all", "measured"])
def test_one_stage_keeps_the_codes_of_the_rule(checkpoint, text, tmp_path, monkeypatch, kept):
    real = one_stage.choose_scales

    def choose(*args):
        choice = real(*args)
        names = {"none": (), "all": args[2], "measured": choice.plain}[kept]
        return dataclasses.replace(choice, plain=frozenset(names))

    monkeypatch.setattr(one_stage, "choose_scales", choose)
    quant = fc.QuantConfig("w1", stages_for={"lm_head": 1})
    report = convert(checkpoint, tmp_path / "p", quant=quant, calibrate=calibration(text))
    convert(checkpoint, tmp_path / "rule", quant=fc.QuantConfig("w1", method="phase"))
    ours, rule = (open_source(tmp_path / name) for name in ("p", "rule"))
    same = 0
    for layer in rule.layers:
        got, want = (source.phase(layer, source.quant) for source in (ours, rule))
        np.testing.assert_array_equal(got.codes, want.codes)
        same += not (got.scales != want.scales).any()
    note = next(note for note in report.notes if "T = 1 keep the scales" in note)
    assert note.startswith(f"{same} of {len(rule.layers)} layers")
    if kept != "measured":
        assert same == {"none": 0, "all": len(rule.layers)}[kept]


def test_budget_with_text(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_STAGES", 3)  # T = 4 takes most of the time
    report = convert(checkpoint, tmp_path / "p", calibrate=calibration(text), bits=2.3)
    weights = sum(np.prod(layer.shape) for layer in report.layers)
    assert 2.1 < report.bits_per_weight <= 2.3
    assert report.bits_per_weight == pytest.approx(
        sum(8 * layer.nbytes for layer in report.layers) / weights
    )
    assert len({layer.stages for layer in report.layers}) > 1
    assert all(layer.loss is not None and layer.loss >= 0 for layer in report.layers)
    by_name = {layer.name: layer for layer in report.layers}
    for i in range(2):
        parts = [by_name[f"model.layers.{i}.self_attn.{part}_proj"].stages for part in "qkv"]
        assert len(set(parts)) == 1
    assert "T by the budget of 2.3 bits (estimated loss)" in report.layers[0].reason
    assert open_source(tmp_path / "p").quant.method == "gptq"


def command(model, text, output, *more):
    arguments = [
        *("convert", str(model), "--calibrate", str(text), "-o", str(output)),
        *("--calibrate-tokens", str(SMALL["tokens"]), "--calibrate-window", str(WINDOW)),
    ]
    return [sys.executable, "-m", "fairy_compile.cli", *arguments, *more]


def environment():
    root = str(Path(fc.__file__).parents[1])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}


# Slows a process down after each part, so that a kill finds it in between.
_SLOW = """
import sys, time
from fairy_compile.calibrate.run import _Run
finish = _Run._finish
def slowly(self, part, solved):
    finish(self, part, solved)
    time.sleep(30)
_Run._finish = slowly
from fairy_compile.cli import main
main()
"""


def test_killed_conversion_goes_on_and_ends_the_same(make_checkpoint, text, tmp_path):
    model = make_checkpoint("llama", num_hidden_layers=3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed has: sums in the same order
    try:
        convert(model, tmp_path / "whole", calibrate=calibration(text))
        arguments = command(model, text, tmp_path / "killed")
        process = subprocess.Popen(
            [sys.executable, "-c", _SLOW, *arguments[3:]],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".killed.partial-*/.calibration/state.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed").exists()
        steps: list[str] = []
        convert(
            model,
            tmp_path / "killed",
            calibrate=calibration(text),
            progress=lambda words, done, count: steps.append(words),
        )
    finally:
        torch.set_num_threads(before)
    solved = [step for step in steps if step.startswith("calibrate: decoder layer")]
    assert [step.split(",")[0] for step in solved] == [
        "calibrate: decoder layer 2 of 3",
        "calibrate: decoder layer 3 of 3",
    ]
    assert "left" in solved[1]
    assert "peak memory" in solved[1]
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "killed")


def test_other_requests_do_not_resume(make_checkpoint, text, tmp_path, monkeypatch):
    model = make_checkpoint()
    own = tmp_path / "text.txt"
    own.write_text(text.read_text())
    finish = run_module._Run._finish

    def interrupted(self, part, solved):
        finish(self, part, solved)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module._Run, "_finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "p", calibrate=calibration(own))
    monkeypatch.undo()
    assert list(tmp_path.glob(".p.partial-*"))
    own.write_text(text.read_text().replace("return", "yield"))
    steps: list[str] = []
    convert(
        model,
        tmp_path / "p",
        calibrate=calibration(own),
        progress=lambda words, done, count: steps.append(words),
    )
    assert steps[0].startswith("calibrate: decoder layer 1 of 2")
    assert not list(tmp_path.glob(".p.partial-*"))


def test_what_decides_the_result_is_in_the_resume_key(make_checkpoint, text):
    model = make_checkpoint()
    quant = fc.QuantConfig(method="gptq")
    windows = read_windows(model, calibration(text))

    def key(quant=quant, windows=windows, by_budget=False):
        return run_module.resume_key(open_source(model), quant, windows, by_budget=by_budget)

    keys = {
        key(),
        key(fc.QuantConfig("w3", method="gptq")),
        key(fc.QuantConfig(method="gptq", scale="row")),
        key(windows=windows[1:]),
        key(windows=windows + 1),
        key(by_budget=True),
    }
    assert key() in keys
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert len(keys | {key()}) == 7


def test_finished_output_is_reused_only_for_the_same(checkpoint, text, tmp_path):
    first = convert(checkpoint, tmp_path / "p", calibrate=calibration(text))
    again = convert(checkpoint, tmp_path / "p", calibrate=calibration(text), force=True, reuse=True)
    assert dataclasses.replace(again, seconds=first.seconds) == first
    other = convert(
        checkpoint, tmp_path / "p", calibrate=calibration(text), quant="w3", force=True, reuse=True
    )
    assert other.bits_per_weight > first.bits_per_weight


def test_dry_run_reads_no_weights(checkpoint, text, tmp_path):
    report = convert(checkpoint, tmp_path / "p", calibrate=calibration(text), dry_run=True)
    assert report.layers[0].reason.endswith("(gptq); T = 3 for this layer")
    assert not (tmp_path / "p").exists()


def test_refusals(checkpoint, make_checkpoint, text, tmp_path, monkeypatch):
    def refused(words, model=checkpoint, **options):
        with pytest.raises(FairyError, match=words):
            convert(model, tmp_path / "p", **options)
        assert not (tmp_path / "p").exists()

    refused("--method gptq looks at calibration text", quant=fc.QuantConfig(method="gptq"))
    for method in ("phase", "alternating"):
        quant = fc.QuantConfig(method=method)
        refused(f"--method {method} looks at no", quant=quant, calibrate=calibration(text))
    refused(r"allowed: 1\.0\d+ to 4", calibrate=calibration(text), bits=0.3)
    refused("there is no data", calibrate=tmp_path / "nothing.txt")
    latents = make_checkpoint("llama")
    config = json.loads((latents / "config.json").read_text())
    (latents / "config.json").write_text(json.dumps(config | {"_name_or_path": "a/Fairy2i-W2"}))
    refused("does not go with master weights", latents, calibrate=calibration(text))
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    refused(r"needs torch; install with pip install 'fairy_compile\[train\]'", calibrate=text)


def test_conversion_without_text_imports_no_torch(checkpoint, tmp_path):
    script = (
        "import sys; import fairy_compile as fc; "
        "fc.convert(sys.argv[1], sys.argv[2], bits=2.5); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(tmp_path / "p")],
        env=environment(),
        check=True,
        timeout=120,
    )
