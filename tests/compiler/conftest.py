"""A tiny model directory shared by the compiler's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny_models import save_model

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="session")
def model_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("compiler") / "model", "llama", **SMALL)


@pytest.fixture
def model(model_once: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that a test may damage."""
    return Path(shutil.copytree(model_once, tmp_path / "model"))
