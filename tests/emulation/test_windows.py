"""Libraries for Windows with TVM's runtime for Windows, under Wine, against PyTorch and Linux."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.targets import load_target
from tests.emulation import wine_rig
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

missing = wine_rig.missing_tools()
pytestmark = [pytest.mark.skipif(missing is not None, reason=str(missing)), pytest.mark.slow]

CONTEXT, PROMPT = 64, 30
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 40).tolist()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> wine_rig.WineRig:
    return wine_rig.WineRig(tmp_path_factory.mktemp("windows"))


def build(source: Path, target: str, act: str, output: Path, **options) -> Path:
    common = {"context": CONTEXT, "prefill_chunk": CONTEXT}
    fc.build(source, target=target, act=act, output=output, **common, **options)
    return output


def linux_logits(artifact: Path) -> np.ndarray:
    """Return what `WineRig.logits` returns, of a library for this machine."""
    with fc.load(artifact) as model:
        engine = model.engine
        sequence = engine.add_sequence()
        rows = [engine.prefill(sequence, TOKENS[:PROMPT])]
        rows += [engine.decode([sequence], [token])[0] for token in TOKENS[PROMPT:]]
        return np.stack(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_logits_equal_pytorch(rig, tmp_path: Path, family: str) -> None:
    """With exact activations, a float32 cache, and for Gemma 2 windows of 12 tokens."""
    source = save_model(tmp_path / "model", family)
    out = build(source, "windows-x86-64-v3", "float", tmp_path / "out", kv_dtype="float32")
    want = Oracle(source, fc.QuantConfig("w2", act="float")).logits(TOKENS)[PROMPT - 1 :]
    assert relative_error(rig.logits(out, TOKENS, PROMPT, CONTEXT), want) <= 1e-4


@pytest.mark.parametrize("act", ["int8", "int16"])
@pytest.mark.parametrize("isa", ["x86-64-v3", "x86-64-v4"])
def test_logits_equal_those_of_linux(rig, tmp_path: Path, isa: str, act: str) -> None:
    """Kernels are the same, the systems' exponential, sine and cosine are not."""
    if not load_target(isa).runs_here():
        pytest.skip(f"this machine cannot execute {isa}")
    source = save_model(tmp_path / "model", "llama")
    windows = build(source, f"windows-{isa}", act, tmp_path / "windows", kv_dtype="float32")
    linux = build(source, isa, act, tmp_path / "linux", kv_dtype="float32")
    seen = rig.logits(windows, TOKENS, PROMPT, CONTEXT)
    assert relative_error(seen, linux_logits(linux)) <= 1e-4
