"""A tiny model, compiled with float activations, and a text for it."""

from __future__ import annotations

import pytest

import fairy_compile as fc
from tests.tiny_models import SMALL, save_model

TEXT = "def function(argument):\n    return argument + 1\n\nprint(function(2) * 3)\n"


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def source(root):
    return save_model(root / "model", "llama", **SMALL, eos_token_id=0)


@pytest.fixture(scope="session")
def packed(root, source):
    fc.convert(source, root / "packed", quant="w2")
    return root / "packed"


@pytest.fixture(scope="session")
def artifact(root, packed):
    """Float activations and cache: it computes what PyTorch does with the same codes."""
    fc.build(packed, act="float", output=root / "artifact", context=128, prefill_chunk=32)
    return root / "artifact"


@pytest.fixture(scope="session")
def text(root):
    path = root / "text.py"
    path.write_text(TEXT * 8)
    return path
