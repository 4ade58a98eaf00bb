"""Whole models on a simulated CUDA device, against PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tvm

import fairy_compile as fc
from fairy_compile.compiler import cuda_binary, pipeline
from fairy_compile.kernels import cuda
from fairy_compile.models import page_tables
from tests.emulation import cuda_graphs, cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_targets import use_linux_host
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

# The device itself is compiled by the compiler of the other simulated devices.
missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = [
    pytest.mark.skipif(missing is not None, reason=str(missing)),
    pytest.mark.slow,
]

TARGETS = ("cuda", "cuda-hopper")
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()
# float: float32 throughout. int16: float16 activations and, for prefill, float16 weights.
TOLERANCE = {"float": 1e-4, "int16": 2e-3}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("act", ["float", "int16"])
def test_logits_and_greedy_tokens_equal_pytorch(rig, patch, tmp_path, family: str, act: str):
    _make_source(patch, tmp_path / "targets")
    source, out = tmp_path / "model", tmp_path / "out"
    save_model(source, family)
    report = fc.build(source, target="cuda", act=act, output=out, context=128, prefill_chunk=32)
    assert set(report.kernels()) == {"cuda.words" if act == "float" else "cuda.planes"}
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), oracle.logits(TOKENS)) <= TOLERANCE[act]
        # Token by token, which decodes with quantised activations.
        sequence = model.engine.add_sequence()
        logits = [model.engine.prefill(sequence, TOKENS[:3])]
        logits += [model.engine.decode([sequence], [token])[0] for token in TOKENS[3:8]]
        want = oracle.logits(TOKENS[:8])[2:]
        assert relative_error(np.array(logits), want) <= TOLERANCE[act]
        if act == "float":
            assert _greedy(model, TOKENS[:5], 32) == oracle.greedy(TOKENS[:5], 32)


@pytest.mark.parametrize("family", ["mistral_window", "gemma2", "gemma3"])
@pytest.mark.parametrize("act", ["float", "int16"])
def test_windows_and_capped_scores_equal_pytorch(rig, patch, tmp_path, family: str, act: str):
    """Windows of 12 tokens: prefill in chunks of 32, and decode beyond them.

    Gemma 3 rounds to float16 57 times, see test_bfloat16_models.py.
    """
    _make_source(patch, tmp_path / "targets")
    source, out = tmp_path / "model", tmp_path / "out"
    save_model(source, family)
    fc.build(source, target="cuda", act=act, output=out, context=128, prefill_chunk=32)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    tolerance = 57**0.5 * 2**-11 if (family, act) == ("gemma3", "int16") else TOLERANCE[act]
    want = oracle.logits(TOKENS)
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), want) <= tolerance
        sequence = model.engine.add_sequence()
        logits = [model.engine.prefill(sequence, TOKENS[:30])]
        logits += [model.engine.decode([sequence], [token])[0] for token in TOKENS[30:]]
        assert relative_error(np.array(logits), want[29:]) <= tolerance


def test_a_long_prompt_on_hopper(rig, patch, tmp_path) -> None:
    """By warpgroup matrix instructions, with images of x and sums of shares of columns."""
    _make_source(patch, tmp_path / "targets")
    source, out = tmp_path / "model", tmp_path / "out"
    wide = {"hidden_size": 256, "intermediate_size": 2304, "initializer_range": 0.06}
    save_model(source, "llama", num_hidden_layers=1, **wide)
    sizes = {"context": 256, "prefill_chunk": 160, "max_batch": 2}
    report = fc.build(source, target="cuda-hopper", act="int16", output=out, **sizes)
    assert set(report.kernels()) == {"cuda.hopper"}
    tokens = np.random.default_rng(4).integers(0, SIZES["vocab_size"], 150).tolist()
    with fc.load(out) as model:
        logits = model.logits(tokens)
    want = Oracle(source, fc.QuantConfig("w2", act="float")).logits(tokens)
    assert relative_error(logits, want) <= TOLERANCE["int16"]


def test_rows_that_are_quantised_by_what_computes_them(rig, patch, tmp_path) -> None:
    """Sizes of which norms and gates can write integers, as those of real models are."""
    _make_source(patch, tmp_path / "targets")
    source, dump = tmp_path / "model", tmp_path / "dump"
    # Weights of half the size at four times the width: rows of x keep theirs.
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    save_model(source, "llama", **wide)
    sizes = {"context": 64, "prefill_chunk": 32}
    results = []
    for normed, images in ((5, 2), (0, 7), (0, 0)):
        out = tmp_path / f"{normed}-{images}"
        if normed == 0:
            patch.setattr(cuda.CudaPlanes, "normalises", lambda self, spec: False)
        if images == 0:
            patch.setattr(pipeline, "QuantizeOnce", lambda: tvm.transform.Sequential([]))
        fc.build(source, target="cuda", act="int16", output=out, debug_dump=dump, **sizes)
        decode = (dump / "01-legalise-operators.py").read_text("utf-8").split("def decode(")[1]
        decode = decode.split("\n    @R.function")[0]
        # qkv, gate and up of two layers and the head follow norms, down follows a gate; o takes
        # what attention computes.
        assert len(re.findall(r"= R.call_tir\(cls\.\w*_normed", decode)) == normed
        assert len(re.findall(r"= R.call_tir\(cls\.\w*_image", decode)) == images
        with fc.load(out) as model:
            sequence = model.engine.add_sequence()
            logits = [model.engine.prefill(sequence, TOKENS[:3])]
            logits += [model.engine.decode([sequence], [token])[0] for token in TOKENS[3:8]]
            results.append(np.array(logits))
    np.testing.assert_array_equal(*results[1:])  # norms in layers add squares in another order
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    want = oracle.logits(TOKENS[:8])[2:]
    for logits in results:
        assert relative_error(logits, want) <= TOLERANCE["int16"]


@pytest.mark.parametrize("act", ["float", "int16"])
def test_graphs_give_the_same_when_they_are_replayed(rig, patch, tmp_path, act: str) -> None:
    """Batches of one size replay what the first of them recorded, whoever is in them.

    These are graphs between attentions of the runtime's cache, as MLC's engine has them; see
    test_cuda_steps.py for those of whole steps.

    With int16, batches of several are quantised by a grid of its own, into memory of the plan.
    """
    recorder = cuda_graphs.install()
    patch.setattr(cuda, "_IMAGE_FROM", 2)
    patch.setattr(page_tables, "serves", lambda shape: False)
    _make_source(patch, tmp_path / "targets")
    source, out = tmp_path / "model", tmp_path / "out"
    save_model(source, "llama")
    sizes = {"context": 64, "prefill_chunk": 32, "max_batch": 4}
    fc.build(source, target="cuda", act=act, output=out, cuda_graphs=True, **sizes)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    with fc.load(out) as model:
        engine = model.engine
        tokens = _greedy(model, TOKENS[:5], 8)
        assert act != "float" or tokens == oracle.greedy(TOKENS[:5], 8)
        # Before the first attention, after each, and what the head does once for a prefill.
        assert recorder.recorded >= SIZES["num_hidden_layers"] + 1
        texts = [TOKENS[i : i + 4] for i in range(3)]
        recorded = None
        for order in ([0, 1, 2], [2, 0, 1], [1, 0], [2, 1]):
            ids = {i: engine.add_sequence() for i in order}
            engine.prefill_many({ids[i]: texts[i] for i in order})
            for step in range(2):
                logits = engine.decode([ids[i] for i in order], [TOKENS[9 + i] for i in order])
                want = [
                    oracle.logits([*texts[i], *[TOKENS[9 + i]] * (step + 1)])[-1] for i in order
                ]
                assert relative_error(logits, np.array(want)) <= TOLERANCE[act]
            if order == [2, 0, 1]:
                assert recorder.recorded == recorded
            recorded = recorder.recorded
            for sequence in ids.values():
                engine.remove_sequence(sequence)
        assert recorder.replayed > recorder.recorded


def _make_source(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let builds for CUDA hold source for this machine."""
    use_linux_host(patch, directory, *TARGETS)
    patch.setattr(pipeline, "machine_code", lambda target: nullcontext())
    patch.setattr(cuda_binary, "find_tool", lambda name: name)


def _greedy(model, prompt: list[int], count: int) -> list[int]:
    sequence = model.engine.add_sequence()
    logits, tokens = model.engine.prefill(sequence, prompt), []
    for _ in range(count):
        tokens.append(int(np.argmax(logits)))
        logits = model.engine.decode([sequence], tokens[-1:])[0]
    return tokens
