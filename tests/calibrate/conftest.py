"""A tiny random model, text to calibrate on, and PyTorch running the whole of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.tiny_models import name_it, save_model  # noqa: E402

WINDOW = 64


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """Return a function that writes an ordinary random model of a family."""

    def make(family: str = "llama", **changes: object) -> Path:
        directory = save_model(tmp_path_factory.mktemp("model") / "tiny", family, **changes)
        name_it(directory, "somebody/tiny")
        return directory

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Return a file of 1000 lines that differ."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["def", "return", "value", "x", "(y)", "+ 1", "=", "for", "in", "range"]
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(1000)))
    return path


@pytest.fixture(scope="session")
def reference():
    """Return a function that loads the whole model, float32."""

    def load(directory: Path):
        import transformers

        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(directory, dtype=torch.float32).eval()

    return load


def full_loss(model, windows: np.ndarray) -> float:
    """Return the mean cross-entropy, nats a token."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
