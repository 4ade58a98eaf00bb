"""Scales of one-stage layers: whichever the quantised model is better with, on other text."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fairy_compile as fc  # noqa: E402
from fairy_compile.calibrate import Calibration, gptq  # noqa: E402
from fairy_compile.calibrate.one_stage import set_aside  # noqa: E402
from fairy_compile.calibrate.windows import read_windows  # noqa: E402
from fairy_compile.frontends import convert, open_source  # noqa: E402
from tests.calibrate.conftest import WINDOW, full_loss  # noqa: E402

SCALES = {"refit_scales": "fitted", "quantize": "plain"}


def spoil(monkeypatch, name):
    """Make what a function returns have scales that are far too large."""
    real = getattr(gptq, name)

    def spoilt(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return dataclasses.replace(tensor, scales=5 * tensor.scales)

    monkeypatch.setattr(gptq, name, spoilt)


def loss_with(reference, checkpoint, packed, windows):
    """Return the loss of the whole model with the values of a packed checkpoint."""
    model, source = reference(checkpoint), open_source(packed)
    state = {n: torch.from_numpy(source.dense(n).astype(np.float32)) for n in source.names()}
    model.load_state_dict(state)
    return full_loss(model, windows)


def losses_told(report):
    note = next(note for note in report.notes if "T = 1 keep the scales" in note)
    return [float(x) for x in re.findall(r"(\d+\.\d{3}) (?:nats|with|as)", note)], note


@pytest.mark.parametrize("quant", ["w1", "w2"])
def test_the_better_scales_are_taken(checkpoint, reference, text, tmp_path, monkeypatch, quant):
    config = fc.QuantConfig(quant, stages_for={"lm_head": 1})
    request = Calibration(str(text), tokens=32 * WINDOW, window=WINDOW)
    _, aside = set_aside(read_windows(checkpoint, request))
    for spoilt in (*SCALES, None):
        with monkeypatch.context() as patch:
            if spoilt:
                spoil(patch, spoilt)
            path = tmp_path / str(spoilt)
            report = convert(checkpoint, path, quant=config, calibrate=request)
        (plain, fitted, chosen), note = losses_told(report)
        assert chosen == min(plain, fitted, chosen)
        ones = 1 if quant == "w2" else len(report.layers)
        if spoilt == "refit_scales":
            assert note.startswith(f"{ones} of {ones} layers")
            assert plain < fitted
        if spoilt == "quantize":
            assert chosen <= fitted < plain
        # The whole model in PyTorch agrees with what was measured layer by layer.
        assert loss_with(reference, checkpoint, path, aside) == pytest.approx(chosen, abs=6e-4)


def test_errors_are_those_of_the_scales_taken(checkpoint, text, tmp_path, monkeypatch):
    spoil(monkeypatch, "refit_scales")
    config = fc.QuantConfig("w1", stages_for={"lm_head": 1})
    request = Calibration(str(text), tokens=32 * WINDOW, window=WINDOW)
    report = convert(checkpoint, tmp_path / "p", quant=config, calibrate=request)
    rule = convert(checkpoint, tmp_path / "r", quant=dataclasses.replace(config, method="phase"))
    ours, theirs = open_source(tmp_path / "p"), open_source(tmp_path / "r")
    for layer, plain in zip(report.layers, rule.layers, strict=True):
        name = f"{layer.name}.weight"
        np.testing.assert_array_equal(ours.dense(name), theirs.dense(name))
        assert layer.nmse == pytest.approx(plain.nmse, rel=1e-5)
        assert 0 < layer.output_error < 1


def test_more_stages_use_all_windows(checkpoint, text, tmp_path):
    request = Calibration(str(text), tokens=32 * WINDOW, window=WINDOW)
    report = convert(checkpoint, tmp_path / "p", calibrate=request)
    assert not any("T = 1" in note for note in report.notes)


@pytest.mark.parametrize(("count", "held"), [(1, 1), (2, 1), (8, 1), (20, 2)])
def test_windows_are_set_aside(count, held):
    windows = np.arange(count * 4).reshape(count, 4)
    rest, aside = set_aside(windows)
    assert len(aside) == held
    if count > 1:
        together = np.sort(np.concatenate([rest, aside]), axis=0)
        np.testing.assert_array_equal(together, windows)
