"""Models linked into one program, as MLC's apps are, for this machine's CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile import targets
from tests.compiler.test_system_lib import link_app, needs_linker
from tests.mlc.conftest import SIZES
from tests.mlc.engine import MlcEngine
from tests.mlc.test_greedy import prompts
from tests.tiny_models import Oracle, save_model

pytestmark = [pytest.mark.slow, needs_linker]
STEPS = 16
QUANTS = {"model-of-two-bits": "w2", "model-of-one-bit": "w1"}


@pytest.fixture
def app_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the target ``cpu`` give objects for an app's linker."""
    text = (targets.targets_directory() / "cpu.toml").read_text("utf-8")
    folder = tmp_path / "targets"
    folder.mkdir()
    (folder / "cpu.toml").write_text(text.replace("\n[tvm]", 'library = "tar"\n[tvm]'), "utf-8")
    monkeypatch.setattr(targets, "targets_directory", lambda: folder)


@pytest.mark.usefixtures("app_host")
def test_models_are_found_by_their_names(tmp_path: Path) -> None:
    """Kernels of one name in both models, each of which gets its own."""
    source = save_model(tmp_path / "model", "llama")
    options = {"act": "float", "kv_dtype": "float32", **SIZES}
    for name, quant in QUANTS.items():
        out = tmp_path / name
        fc.build(source, target="cpu", quant=quant, output=out, model_lib=name, **options)
    app = link_app([tmp_path / name / "model.tar" for name in QUANTS], tmp_path)
    for name, quant in QUANTS.items():
        oracle = Oracle(source, fc.QuantConfig(quant, act="float"))
        engine = MlcEngine(tmp_path / name, linked=name)
        answers = engine.generate(prompts(), temperature=0, max_tokens=STEPS)
        want = [oracle.greedy(prompt, STEPS) for prompt in prompts()]
        assert [choices[0].tokens for choices in answers] == want
    del app
