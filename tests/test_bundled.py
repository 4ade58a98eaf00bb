"""The bundled model: built and run by the core alone, as `make demo` does."""

from __future__ import annotations

import json
import json.decoder
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc

MODEL = Path(__file__).parent.parent / "examples" / "bundled" / "model"
MAX_BYTES = 8 << 20

# Runs with torch and transformers impossible to import.
CORE_ONLY = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import fairy_compile as fc
fc.build(sys.argv[1], target="cpu", output=sys.argv[2])
with fc.load(sys.argv[2]) as model:
    print(model.chat([{"role": "user", "content": "Hello"}], max_tokens=40, temperature=0.0))
"""


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the artifact and what it answered to a greeting."""
    out = tmp_path_factory.mktemp("bundled") / "int8"
    command = [sys.executable, "-c", CORE_ONLY, str(MODEL), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_checkpoint_is_small() -> None:
    assert sum(p.stat().st_size for p in MODEL.iterdir()) <= MAX_BYTES


def test_core_builds_and_chats_without_torch(int8) -> None:
    """The greeting is one it learnt."""
    assert "fairy_compile" in int8[1]


def test_it_knows_the_standard_library_and_int8_costs_next_to_nothing(int8, tmp_path: Path) -> None:
    """Loss on a module of its corpus: no worse than on what it never saw, far from chance."""
    held_out = json.loads((MODEL / "metrics.json").read_text())["packed"]["source"]["loss"]
    text = Path(json.decoder.__file__).read_text("utf-8")
    fc.build(MODEL, target="cpu", act="float", output=tmp_path / "float")
    losses = []
    for directory in (int8[0], tmp_path / "float"):
        with fc.load(directory) as model:
            tokens = model.tokenizer.encode(text)[:512]
            logits = model.logits(tokens).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-log_p[np.arange(511), tokens[1:]].mean())
    assert losses[1] < held_out < np.log(3072) - 4
    assert abs(losses[0] - losses[1]) < 0.05
