"""A tiny artifact shared by the tests of `bench`."""

import pytest

import fairy_compile as fc
from tests.tiny_models import save_model

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    source = save_model(root / "model", "llama", **SMALL)
    fc.build(source, output=root / "artifact", context=128, prefill_chunk=32)
    return root / "artifact"
