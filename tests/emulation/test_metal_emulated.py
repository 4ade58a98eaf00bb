"""Whole models and single kernels on a simulated Metal device, against PyTorch and NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.emulation import metal_rig
from tests.emulation.gpu_targets import use_linux_host
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

missing = metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()
TOLERANCE = {"float": 1e-4, "int8": 2e-3}  # float32 and float16 activations


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> metal_rig.MetalRig:
    return metal_rig.MetalRig(tmp_path_factory.mktemp("metal"))


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module")
def built(rig, patch, tmp_path_factory):
    """Return built(family, act) -> (artifact directory, logits of PyTorch for TOKENS)."""
    root = tmp_path_factory.mktemp("models")
    use_linux_host(patch, root / "targets", "metal")
    cache: dict = {}

    def get(family: str, act: str) -> tuple[Path, Oracle]:
        if (family, act) not in cache:
            source = root / family
            if not source.exists():
                save_model(source, family)
            out = root / f"{family}-{act}"
            fc.build(source, target="metal", act=act, output=out, context=128, prefill_chunk=32)
            cache[family, act] = (out, Oracle(source, fc.QuantConfig("w2", act="float")))
        return cache[family, act]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_and_greedy_tokens_equal_pytorch(rig, built, family: str, act: str) -> None:
    out, oracle = built(family, act)
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), oracle.logits(TOKENS)) <= TOLERANCE[act]
        if act == "float":
            assert greedy(model, TOKENS[:5], 32) == oracle.greedy(TOKENS[:5], 32)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    engine = model.engine
    sequence = engine.add_sequence()
    logits, tokens = engine.prefill(sequence, prompt), []
    for _ in range(count):
        tokens.append(int(np.argmax(logits)))
        logits = engine.decode([sequence], tokens[-1:])[0]
    return tokens
