"""Whole models with mixtures of experts on simulated GPUs, against PyTorch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.compiler import cuda_binary, pipeline
from tests.emulation import cuda_graphs
from tests.emulation.gpu_targets import use_linux_host
from tests.emulation.rigs import RIGS
from tests.emulation.spirv_val import validate
from tests.emulation.vulkan_module import kernels_in
from tests.greedy import greedy
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

pytestmark = pytest.mark.slow
FAMILIES = ("mixtral", "qwen3_moe")
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()
# As of other models on these devices: float32, and float16 activations.
TOLERANCE = {"float": 1e-4, "half": 2e-3}


@pytest.fixture
def build(rig_of, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return build(kind, source, **options) -> (report, artifact) for a simulated device."""
    monkeypatch.setattr(pipeline, "machine_code", lambda target: nullcontext())
    monkeypatch.setattr(cuda_binary, "find_tool", lambda name: name)

    def make(kind: str, source: Path, **options: Any) -> tuple[fc.BuildReport, Path]:
        rig_of(kind)
        use_linux_host(monkeypatch, tmp_path / "targets", kind)
        sizes = {"context": 128, "prefill_chunk": 32, "max_batch": 4}
        out = tmp_path / "out"
        return fc.build(source, target=kind, output=out, **sizes, **options), out

    return make


def check(out: Path, oracle: Oracle, tolerance: float) -> None:
    """Compare prefill in pieces, and steps of one and of three sequences."""
    prompts = [TOKENS[i : i + 3 + i] for i in range(3)]
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), oracle.logits(TOKENS)) <= tolerance
        engine = model.engine
        ids = [engine.add_sequence() for _ in prompts]
        engine.prefill_many(dict(zip(ids, prompts, strict=True)))
        for count in (1, 3):
            steps = engine.decode(ids[:count], [7 + i for i in range(count)])
            for i in range(count):
                want = oracle.logits([*prompts[i], 7 + i])[-1]
                assert relative_error(steps[i], want) <= tolerance
                engine.popn(ids[i], 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", RIGS)
def test_logits_and_greedy_tokens_equal_pytorch(build, tmp_path, kind: str, family: str) -> None:
    source = save_model(tmp_path / "model", family)
    report, out = build(kind, source, act="float")
    assert set(report.kernels()) == {f"{kind}.words", "dense"}
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    check(out, oracle, TOLERANCE["float"])
    if kind == "vulkan":
        for kernel in kernels_in((out / "model.so").read_bytes()).values():
            validate(kernel.code)
    with fc.load(out) as model:
        assert greedy(model, TOKENS[:5], 32) == oracle.greedy(TOKENS[:5], 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["metal", "vulkan", "webgpu"])
def test_float16_activations(build, tmp_path: Path, kind: str, family: str) -> None:
    source = save_model(tmp_path / "model", family)
    _, out = build(kind, source)
    check(out, Oracle(source, fc.QuantConfig("w2", act="float")), TOLERANCE["half"])


def test_other_kernels_beside_those_of_experts(build, tmp_path: Path) -> None:
    """On CUDA, where experts compute in floating point and the rest in integers."""
    source = save_model(tmp_path / "model", "mixtral")
    report, out = build("cuda", source, act="int16")
    assert set(report.kernels()) == {"cuda.planes", "cuda.words", "dense"}
    check(out, Oracle(source, fc.QuantConfig("w2", act="float")), TOLERANCE["half"])


def test_graphs_do_not_hold_what_a_router_chose(build, tmp_path: Path) -> None:
    recorder = cuda_graphs.install()
    source = save_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2)
    _, out = build("cuda", source, act="float", cuda_graphs=True)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    check(out, oracle, TOLERANCE["float"])
    with fc.load(out) as model:
        assert greedy(model, TOKENS[:5], 8) == oracle.greedy(TOKENS[:5], 8)
    assert recorder.replayed > recorder.recorded


def test_dense_experts(build, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
    quant = fc.QuantConfig("w2", act="float", exempt=("*.experts.*",))
    report, out = build("metal", source, quant=quant)
    experts = {row.kernel for row in report.layers if ".experts." in row.name}
    assert experts == {"dense"}
    check(out, Oracle(source, quant), TOLERANCE["float"])
