"""A tiny artifact shared by the tests of `bench`."""

import pytest

import fairy_compile as fc
from tests.tiny_models import SMALL, save_model


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    source = save_model(root / "model", "llama", **SMALL)
    fc.build(source, output=root / "artifact", context=128, prefill_chunk=32)
    return root / "artifact"
