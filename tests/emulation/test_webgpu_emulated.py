"""WebGPU outside of browsers: kernels against NumPy, whole models against PyTorch.

The device has 16-bit floats; `tests/web` runs libraries in a browser, in 32 bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.kernels import sampler_gpu, sort_gpu
from fairy_compile.kernels.webgpu import WEBGPU_KERNELS
from tests.emulation import webgpu_rig
from tests.emulation.gpu_cases import (
    SHAPES,
    call,
    compile_functions,
    gpu_spec,
    host_target,
    largest_error,
)
from tests.emulation.gpu_targets import use_linux_host
from tests.greedy import greedy
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

missing = webgpu_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

KERNEL = WEBGPU_KERNELS[0]
QWEN2_VOCABULARY = 151936
HALF = 2e-3  # with float16 activations, as on Metal
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()


@pytest.fixture(scope="module", autouse=True)
def rig(tmp_path_factory: pytest.TempPathFactory) -> webgpu_rig.WebGpuRig:
    return webgpu_rig.WebGpuRig(tmp_path_factory.mktemp("webgpu"))


def check(shape: tuple, dtype: str, batch: int, directory: Path, **options) -> None:
    spec, target = gpu_spec(shape, dtype), host_target("webgpu")
    assert largest_error(KERNEL, spec, target, batch, directory, **options) <= 1


@pytest.mark.parametrize(
    ("dtype", "batch"), [("float16", 1), ("float16", 17), ("float32", 1), ("float32", 17)]
)
def test_phase_kernel_matches_reference(tmp_path: Path, dtype: str, batch: int) -> None:
    check(SHAPES[0], dtype, batch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_reference(
    tmp_path: Path, shape: tuple, dtype: str, batch: int
) -> None:
    check(shape, dtype, batch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("knob", ["threads", "rows", "tokens", "switch", "tile_tokens"])
def test_every_knob_computes_the_same(tmp_path: Path, knob: str) -> None:
    for value in KERNEL.knobs[knob]:
        for batch in (1, 7):
            check(SHAPES[0], "float16", batch, tmp_path, knobs={knob: value})


def sample(directory: Path, vocab: int, rows: int) -> None:
    """Sort probabilities with ties, then draw from nuclei of them."""
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.full(vocab, 0.05), rows).astype(np.float32)
    probs[:, 1 :: vocab // 7] = probs[:, :1]
    probs /= probs.sum(axis=1, keepdims=True)
    target = host_target("webgpu")
    library = compile_functions(
        {
            "argsort": sort_gpu.build_argsort(vocab),
            "sample": sampler_gpu.build_sample_top_p(),
        },
        target,
        directory,
    )
    width = sort_gpu.sort_width(vocab)
    workspace = [np.zeros((rows, width), dtype) for dtype in (np.float32, np.int32)]
    empty = [np.zeros((rows, vocab), dtype) for dtype in (np.float32, np.int32)]
    _, values, index, *_ = call(library, "argsort", target, [probs, *empty, *workspace])
    want = np.argsort(-probs, axis=1, kind="stable")
    np.testing.assert_array_equal(index, want)
    np.testing.assert_array_equal(values, np.take_along_axis(probs, want, axis=1))
    top_p = np.array([0.9, 0.3, 1e-6][:rows], np.float32)
    uniform = rng.random(rows, np.float32)
    drawn = np.full(rows, -1, np.int32)
    arguments = [values, index, uniform, np.arange(rows, dtype=np.int32), top_p, drawn]
    tokens = call(library, "sample", target, arguments)[-1]
    for row, token in enumerate(tokens):
        sums = np.cumsum(values[row].astype(np.float64))
        kept = int(np.argmax(sums >= top_p[row]))
        rank = int(np.flatnonzero(index[row] == token)[0])
        assert rank <= kept
        # The draw's place among the sums, but for rounding of sums in float32.
        place = float(uniform[row]) * sums[kept]
        rounding = vocab * np.finfo(np.float32).eps
        assert sums[rank] - values[row, rank] - rounding <= place <= sums[rank] + rounding


def test_small_vocabularies_sort_and_sample(tmp_path: Path) -> None:
    sample(tmp_path, 320, 3)


@pytest.mark.slow
def test_a_vocabulary_of_152k_sorts_and_samples(tmp_path: Path) -> None:
    sample(tmp_path, QWEN2_VOCABULARY, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "quant"), [("llama", "w2"), ("qwen2", "w1"), ("gemma2", "w2")])
def test_whole_model_equals_pytorch(
    rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, quant: str
) -> None:
    use_linux_host(monkeypatch, tmp_path / "targets", "webgpu")
    source = save_model(tmp_path / family, family)
    common = {"target": "webgpu", "quant": quant, "context": 128, "prefill_chunk": 32}
    fc.build(source, act="float", output=tmp_path / "exact", **common)
    oracle = Oracle(source, fc.QuantConfig(quant, act="float"))
    want = oracle.logits(TOKENS)
    with fc.load(tmp_path / "exact") as model:
        assert relative_error(model.logits(TOKENS), want) <= 1e-4
        assert greedy(model, TOKENS[:5], 8) == oracle.greedy(TOKENS[:5], 8)
    assert any(name.startswith("webgpu_words_single") for name in rig.launches)
    fc.build(source, output=tmp_path / "half", **common)
    with fc.load(tmp_path / "half") as model:
        assert relative_error(model.logits(TOKENS), want) <= HALF
