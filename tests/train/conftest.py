"""A tiny model with its tokenizer, and text it can learn."""

from __future__ import annotations

import pytest

from fairy_compile.train import TrainConfig
from tests.tiny_models import save_model
from tests.torch_threads import one_thread  # noqa: F401

TEXT = "def function(argument):\n    return argument + 1\n"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("train") / "model", "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 200)
    return path


@pytest.fixture
def config(model, text, tmp_path):
    """Return make(**changes) -> `TrainConfig` of a run of some seconds."""

    def make(**changes):
        settings = {
            "model": str(model),
            "data": str(text),
            "output": str(tmp_path / "out"),
            "steps": 10,
            "block": 32,
            "batch": 4,
            "lr": 3e-3,
            "log_every": 2,
            "cpu": True,
        }
        return TrainConfig(**(settings | changes))

    return make
