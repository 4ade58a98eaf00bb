"""A tiny model for the runtime tests."""

from __future__ import annotations

import json

import pytest

from tests.tvm_threads import whole_pool  # noqa: F401

from .tiny_tokenizers import byte_level_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return (directory, weights) of the tiny model, compiled once."""
    from .tiny_library import write_tiny_model

    directory = tmp_path_factory.mktemp("tiny")
    return directory, write_tiny_model(directory, byte_level_tokenizer().to_str())


@pytest.fixture(scope="session")
def make_engine(tiny):
    """Return a function that opens an `Engine` on the tiny model, config overridden."""
    from fairy_compile.runtime import Engine

    def make(config=None, **options):
        directory, _ = tiny
        content = json.loads((directory / "mlc-chat-config.json").read_text("utf-8"))
        return Engine(directory, directory / "model.so", content | (config or {}), **options)

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


@pytest.fixture
def model(tiny, make_engine):
    from fairy_compile.runtime import Model

    return Model(tiny[0], make_engine())
