"""Tuning scales and gains: nearer to the floating-point model, codes untouched."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fairy_compile as fc  # noqa: E402
from fairy_compile.calibrate import Calibration, tune  # noqa: E402
from fairy_compile.calibrate.windows import read_windows  # noqa: E402
from fairy_compile.errors import FairyError  # noqa: E402
from fairy_compile.frontends import convert, open_source  # noqa: E402
from fairy_compile.phase import quantize  # noqa: E402
from tests.calibrate.conftest import WINDOW  # noqa: E402


def test_scales_and_gains_bring_the_model_nearer(checkpoint, reference, text, tmp_path):
    options = {"tokens": 32 * WINDOW, "window": WINDOW}
    quant = fc.QuantConfig("w2", scale="row")
    convert(
        checkpoint, tmp_path / "plain", quant=quant, calibrate=Calibration(str(text), **options)
    )
    report = convert(
        checkpoint,
        tmp_path / "tuned",
        quant=quant,
        calibrate=Calibration(str(text), tune=15, **options),
    )
    plain, tuned = (open_source(tmp_path / name) for name in ("plain", "tuned"))
    for layer in plain.layers:
        before, after = (source.phase(layer, source.quant) for source in (plain, tuned))
        np.testing.assert_array_equal(before.codes, after.codes)
        assert (before.scales != after.scales).any()
    norm = "model.layers.0.input_layernorm.weight"
    assert (plain.dense(norm) != tuned.dense(norm)).any()
    assert all("scales tuned" in layer.reason for layer in report.layers)
    assert any("scales and norm gains tuned in 15 steps" in note for note in report.notes)

    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(text.read_text().split("\n"))))
    windows = read_windows(checkpoint, Calibration(str(other), 8 * WINDOW, WINDOW))
    exact = reference(checkpoint)
    divergence = {}
    for source in (plain, tuned):
        model = reference(checkpoint)
        state = {n: torch.from_numpy(source.dense(n)) for n in source.names()}
        model.load_state_dict(state, assign=True)
        divergence[source] = tune._divergence(exact, model, windows, torch.device("cpu"))
    assert divergence[tuned] < divergence[plain]


def test_nothing_changes_where_nothing_is_gained(checkpoint, text, monkeypatch):
    source = open_source(checkpoint)
    windows = read_windows(checkpoint, Calibration(str(text), 4 * WINDOW, WINDOW))
    name = "model.layers.0.mlp.up_proj"
    tensors = {name: quantize(source.dense(f"{name}.weight"))}
    monkeypatch.setattr(tune, "_optimise", lambda *args: None)
    found = tune.tune(source, tensors, windows, 3, torch.device("cpu"))
    assert (found.tensors, found.dense) == ({}, {})
    assert found.before == found.after > 0


def test_refusals(checkpoint, text, monkeypatch):
    source = open_source(checkpoint)
    windows = read_windows(checkpoint, Calibration(str(text), WINDOW, WINDOW))
    with pytest.raises(FairyError, match="two windows"):
        tune.tune(source, {}, windows, 3, torch.device("cpu"))
    monkeypatch.setattr(tune, "memory_bytes", lambda: 1000)
    with pytest.raises(FairyError, match=r"and this machine has 1.0 kB; leave --tune out"):
        tune.check_memory(source)
