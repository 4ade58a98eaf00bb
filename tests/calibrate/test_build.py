"""`build --calibrate`: the artifact computes what the calibrated codes say."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fairy_compile as fc  # noqa: E402
from fairy_compile.calibrate import Calibration  # noqa: E402
from fairy_compile.calibrate import run as run_module  # noqa: E402
from fairy_compile.compiler.write import write_params  # noqa: E402
from fairy_compile.frontends import convert, open_source  # noqa: E402
from tests.calibrate.conftest import WINDOW  # noqa: E402
from tests.tiny_models import relative_error  # noqa: E402

# The package's attribute of that name is the function.
build_module = importlib.import_module("fairy_compile.compiler.build")
TOKENS = [5, 17, 300, 2, 44, 45, 46, 9]


def dequantised_logits(model, packed) -> np.ndarray:
    """Return the logits of a PyTorch model with the weights of a packed checkpoint."""
    source = open_source(packed)
    state = {n: torch.from_numpy(source.dense(n).astype(np.float32)) for n in source.names()}
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def test_build_with_text_and_budget(checkpoint, reference, text, tmp_path, monkeypatch):
    options = {
        "calibrate": Calibration(str(text), tokens=16 * WINDOW, window=WINDOW),
        "bits": 2.5,
    }
    packed = tmp_path / "packed"
    monkeypatch.setattr(run_module, "MAX_STAGES", 3)  # T = 4 takes most of the time
    report = convert(checkpoint, packed, **options)
    assert len({layer.stages for layer in report.layers}) > 1
    want = dequantised_logits(reference(checkpoint), packed)

    # Interrupted after the conversion, which leaves a packed checkpoint and is not repeated.
    output = tmp_path / "direct"
    monkeypatch.setattr(build_module, "write_params", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        fc.build(checkpoint, output=output, act="float", **options)
    monkeypatch.setattr(build_module, "write_params", write_params)
    assert (tmp_path / ".direct.converted" / "calibration.json").is_file()
    steps: list[str] = []
    built = fc.build(
        checkpoint,
        output=output,
        act="float",
        progress=lambda words, done, count: steps.append(words),
        **options,
    )
    assert not any("calibrate" in step for step in steps)
    assert not (tmp_path / ".direct.converted").exists()
    assert any("calibrated on" in note for note in built.notes)
    assert not any("packed" in note for note in built.notes)
    assert relative_error(fc.load(output).logits(TOKENS), want) < 1e-4
    manifest = json.loads((output / "fairy.json").read_text())
    assert manifest["quant"]["method"] == "gptq"
    assert manifest["source"]["name"] == "tiny"


def _interrupt(*args):
    raise KeyboardInterrupt


def test_dry_run_plans(checkpoint, text):
    report = fc.build(checkpoint, calibrate=Calibration(str(text)), dry_run=True)
    assert any("method gptq" in note for note in report.notes)
    with pytest.raises(fc.FairyError, match="dry run"):
        fc.build(checkpoint, bits=2.5, dry_run=True)
    with pytest.raises(fc.FairyError, match="give some with --calibrate"):
        fc.build(checkpoint, method="gptq", dry_run=True)
