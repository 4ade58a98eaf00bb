"""Decode steps that are one CUDA graph each, on a simulated CUDA device, against PyTorch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.artifact.contract import BATCH_DECODE_PAGES, DECODE_PAGES, PREFILL_PAGES
from fairy_compile.bench.kernels import time_kernels
from fairy_compile.compiler import cuda_binary, pipeline
from tests.emulation import cuda_graphs, cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_targets import use_linux_host
from tests.greedy import greedy
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = [
    pytest.mark.skipif(missing is not None, reason=str(missing)),
    pytest.mark.slow,
]

TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 120).tolist()
# float: float32 throughout. int16: float16 activations and, for prefill, float16 weights.
TOLERANCE = {"float": 1e-4, "int16": 2e-3}
FAMILIES = (
    *("llama3", "llama_yarn", "qwen2", "qwen3", "phi3_longrope", "stablelm_12b", "olmo2"),
    *("mistral_window", "gemma2", "gemma3", "mixtral"),
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    cuda_graphs.install()
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def build(rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Return build(source, **options) -> artifact whose decode steps are graphs."""
    monkeypatch.setattr(pipeline, "machine_code", lambda target: nullcontext())
    monkeypatch.setattr(cuda_binary, "find_tool", lambda name: name)
    use_linux_host(monkeypatch, tmp_path / "targets", "cuda", "cuda-hopper")

    def make(source: Path, target: str = "cuda", **options: Any) -> Path:
        sizes = {"context": 128, "prefill_chunk": 32, "max_batch": 4, **options}
        fc.build(source, target=target, output=tmp_path / "out", cuda_graphs=True, **sizes)
        return tmp_path / "out"

    return make


def check(out: Path, oracle: Oracle, tolerance: float) -> None:
    """Compare prefill in chunks, and steps of one and of three sequences."""
    prompts = [TOKENS[i : i + 3 + 17 * i] for i in range(3)]
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS[:45]), oracle.logits(TOKENS[:45])) <= tolerance
        engine = model.engine
        ids = [engine.add_sequence() for _ in prompts]
        engine.prefill_many(dict(zip(ids, prompts, strict=True)))
        for count in (1, 3):
            steps = engine.decode(ids[:count], [7 + i for i in range(count)])
            for i in range(count):
                want = oracle.logits([*prompts[i], 7 + i])[-1]
                assert relative_error(steps[i], want) <= tolerance
                engine.popn(ids[i], 1)
        assert {PREFILL_PAGES, DECODE_PAGES, BATCH_DECODE_PAGES} <= set(engine.counts)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(build, tmp_path: Path, family: str) -> None:
    """Rope of every kind, norms of queries and keys, windows, caps and experts."""
    source = save_model(tmp_path / "model", family)
    out = build(source, act="float")
    check(out, Oracle(source, fc.QuantConfig("w2", act="float")), TOLERANCE["float"])


@pytest.mark.parametrize(
    ("target", "changes"),
    [("cuda", {}), ("cuda-hopper", {"hidden_size": 256, "intermediate_size": 512})],
)
def test_integers_and_tensor_cores(build, tmp_path: Path, target: str, changes) -> None:
    """Rows that their layers normalise or that gates write as integers, in a graph."""
    # Weights of half the size at four times the width: rows of x keep theirs.
    wide = {"initializer_range": 0.06, **changes} if changes else {}
    source = save_model(tmp_path / "model", "llama", **wide)
    out = build(source, target=target, act="int16")
    check(out, Oracle(source, fc.QuantConfig("w2", act="float")), TOLERANCE["int16"])


def test_heads_of_other_sizes(build, tmp_path: Path) -> None:
    """Attention kernels that all GPUs share: 24 elements are no power of two of units."""
    source = save_model(tmp_path / "model", "llama", head_dim=24)
    out = build(source, act="float")
    check(out, Oracle(source, fc.QuantConfig("w2", act="float")), TOLERANCE["float"])


def test_a_step_is_one_graph(build, tmp_path: Path) -> None:
    """It is recorded again for other numbers of sequences and of pages, and for nothing else."""
    recorder = cuda_graphs.install()
    source = save_model(tmp_path / "model", "llama")
    out = build(source, act="float")
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    with fc.load(out, kv_tokens=1024) as model:
        engine, before = model.engine, recorder.recorded
        assert greedy(model, TOKENS[:5], 32) == oracle.greedy(TOKENS[:5], 32)
        assert recorder.recorded == before + 1
        for calls in (model.trace_kernels(TOKENS[:3]), _timed_calls(model.engine)):
            counts = [n for name, n in calls.items() if name.startswith("attention_pages")]
            assert counts == [SIZES["num_hidden_layers"]]
        texts = [TOKENS[i : i + 4] for i in range(3)]
        for order in ([0, 1, 2], [2, 0, 1], [1, 0], [2, 1]):
            ids = {i: engine.add_sequence() for i in order}
            engine.prefill_many({ids[i]: texts[i] for i in order})
            for step in range(2):
                logits = engine.decode([ids[i] for i in order], [TOKENS[9 + i] for i in order])
                want = [
                    oracle.logits([*texts[i], *[TOKENS[9 + i]] * (step + 1)])[-1] for i in order
                ]
                assert relative_error(logits, np.array(want)) <= TOLERANCE["float"]
            for sequence in ids.values():
                engine.remove_sequence(sequence)
        assert recorder.recorded == before + 3


def test_a_closed_model_is_freed_at_once(build, tmp_path: Path) -> None:
    """Its weights, too: nothing of it refers to itself, which would wait for a collection."""
    out = build(save_model(tmp_path / "model", "llama"), act="float")
    gc.disable()
    try:
        with fc.load(out) as model:
            sequence = model.engine.add_sequence()
            model.engine.prefill(sequence, TOKENS[:20])
            model.engine.fork(sequence, 9)
            kept = [weakref.ref(x) for x in (model.engine, model.engine.steps)]
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


def _timed_calls(engine: Any) -> dict[str, int]:
    sequence = engine.add_sequence()
    engine.prefill(sequence, TOKENS[:3])
    rows = time_kernels(engine, sequence, TOKENS[3])
    engine.remove_sequence(sequence)
    return {row.name: row.calls for row in rows}


def test_contexts_in_parts_and_shared_pages(build, tmp_path: Path) -> None:
    """Contexts of more than 256 tokens, whose parts are merged; forks, and texts cut back."""
    recorder = cuda_graphs.install()
    source = save_model(tmp_path / "model", "llama", max_position_embeddings=512)
    out = build(source, act="float", context=512)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    text = (TOKENS * 4)[:300]

    def step(sequence: int, tokens: list[int]) -> None:
        logits = engine.decode([sequence], tokens[-1:])[0]
        assert relative_error(logits, oracle.logits(tokens)[-1]) <= TOLERANCE["float"]

    with fc.load(out, kv_tokens=1024) as model:
        engine, before = model.engine, recorder.recorded
        parent = engine.add_sequence()
        engine.prefill(parent, text)
        step(parent, [*text, 7])
        child = engine.fork(parent, 250)  # in the middle of a page
        step(child, [*text[:250], 9])
        step(parent, [*text, 7, 8])
        twin = engine.fork(child)
        step(twin, [*text[:250], 9, 3])
        step(child, [*text[:250], 9, 4])
        engine.popn(parent, 40)
        step(parent, [*text[:262], 5])
        engine.remove_sequence(child)
        step(twin, [*text[:250], 9, 3, 2])
        assert recorder.recorded == before + 2  # up to 16 pages, and up to 32
        engine.remove_sequence(parent)
        engine.remove_sequence(twin)
        assert engine.cache.used_pages == 0
