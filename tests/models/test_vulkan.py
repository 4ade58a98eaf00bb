"""Whole models built for Vulkan: valid SPIR-V, and logits on lavapipe against PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fairy_compile as fc
from tests.emulation.spirv_val import missing_validator, validate
from tests.emulation.vulkan_device import missing_driver
from tests.emulation.vulkan_module import kernels_in
from tests.tiled_models import TILED_MODELS, largest_logit_error, save_tiled
from tests.tiny_ifairy import Published, save_ifairy
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 37).tolist()
FLOAT32_TOLERANCE = 1e-4  # relative
FLOAT16_TOLERANCE = 2e-2  # absolute, of logits with a standard deviation near 1
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def lavapipe():
    reason = missing_driver() or missing_validator()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return build(family, act, quant) -> (artifact, source); artifacts are made once."""
    root = tmp_path_factory.mktemp("vulkan")

    def make(family: str, act: str, quant: str = "w2"):
        source, out = root / family, root / f"{family}-{act}-{quant}"
        if not source.exists():
            save_model(source, family)
        if not out.exists():
            fc.build(
                source,
                target="vulkan",
                quant=fc.QuantConfig(quant, act=act),
                output=out,
                context=128,
                prefill_chunk=32,
            )
        return out, source

    return make


CASES = [
    pytest.param("llama", "float", "w2"),
    pytest.param("llama", "int8", "w2", marks=slow),
    pytest.param("llama", "float", "w1", marks=slow),
    pytest.param("qwen2", "float", "w2", marks=slow),
    pytest.param("qwen2", "int8", "w3", marks=slow),
    pytest.param("gemma2", "float", "w2", marks=slow),
    pytest.param("gemma3", "float", "w2", marks=slow),
    pytest.param("mistral_window", "float", "w2", marks=slow),
]


@pytest.mark.parametrize(
    ("family", "act", "quant"), [*CASES, pytest.param("gemma3", "int8", "w2", marks=slow)]
)
def test_every_kernel_is_valid(build, family, act, quant):
    artifact, _ = build(family, act, quant)
    kernels = kernels_in((artifact / "model.so").read_bytes())
    assert len(kernels) > 30
    for kernel in kernels.values():
        validate(kernel.code)


@pytest.mark.parametrize(("family", "act", "quant"), CASES)
def test_logits_equal_pytorch(build, family, act, quant):
    artifact, source = build(family, act, quant)
    expected = Oracle(source, fc.QuantConfig(quant, act="float")).logits(TOKENS)
    with fc.load(artifact) as model:
        assert str(model.engine.device).startswith("vulkan")
        whole = model.logits(TOKENS)
        engine = model.engine
        sequence = engine.add_sequence()
        engine.prefill(sequence, TOKENS[:-6])
        stepped = [engine.decode([sequence], [token])[0] for token in TOKENS[-6:]]
    for seen, wanted in ((whole, expected), (np.stack(stepped), expected[-6:])):
        if act == "float":
            assert relative_error(seen, wanted) <= FLOAT32_TOLERANCE
        else:
            np.testing.assert_allclose(seen, wanted, rtol=0, atol=FLOAT16_TOLERANCE)


def test_generates_the_same_tokens(build):
    artifact, source = build("llama", "float")
    expected = Oracle(source, fc.QuantConfig("w2", act="float")).greedy(TOKENS[:5], 8)
    with fc.load(artifact) as model:
        engine = model.engine
        sequence = engine.add_sequence()
        logits = engine.prefill(sequence, TOKENS[:5])
        seen = []
        for _ in range(8):
            seen.append(int(np.argmax(logits)))
            logits = engine.decode([sequence], [seen[-1]])[0]
    assert seen == expected[-8:]


@slow
@pytest.mark.parametrize("name", TILED_MODELS)
def test_models_with_scales_a_tile_equal_pytorch(tmp_path, name):
    source, oracle = save_tiled(name, tmp_path)
    sizes = {"context": 128, "prefill_chunk": 32}
    fc.build(source, target="vulkan", act="float", output=tmp_path / "out", **sizes)
    for kernel in kernels_in((tmp_path / "out" / "model.so").read_bytes()).values():
        validate(kernel.code)
    with fc.load(tmp_path / "out") as model:
        assert str(model.engine.device).startswith("vulkan")
        assert largest_logit_error(model, oracle) <= FLOAT32_TOLERANCE


@slow
def test_bfloat16_activations(tmp_path):
    """Roundings to 8 bits, see tests/emulation/test_bfloat16_models.py: 22 of them."""
    source, out = save_model(tmp_path / "model", "llama"), tmp_path / "out"
    sizes = {"context": 128, "prefill_chunk": 32}
    fc.build(source, target="vulkan", act_dtype="bfloat16", output=out, **sizes)
    for kernel in kernels_in((out / "model.so").read_bytes()).values():
        validate(kernel.code)
    expected = Oracle(source, fc.QuantConfig("w2", act="float")).logits(TOKENS)
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), expected) <= math.sqrt(22) * 2.0**-8


@pytest.fixture(scope="module")
def build_ifairy(tmp_path_factory):
    """Return build(kv_dtype) -> (artifact, source); GPUs take float32 activations only."""
    root = tmp_path_factory.mktemp("ifairy")

    def make(kv_dtype: str):
        source, out = root / "model", root / kv_dtype
        if not source.exists():
            save_ifairy(source)
        if not out.exists():
            sizes = {"context": 128, "prefill_chunk": 32}
            fc.build(source, target="vulkan", act="float", kv_dtype=kv_dtype, output=out, **sizes)
        return out, source

    return make


IFAIRY_CASES = [pytest.param(dtype, marks=slow) for dtype in ("float32", "float16")]


@pytest.mark.parametrize("kv_dtype", IFAIRY_CASES)
def test_every_ifairy_kernel_is_valid(build_ifairy, kv_dtype):
    artifact, _ = build_ifairy(kv_dtype)
    kernels = kernels_in((artifact / "model.so").read_bytes())
    assert len(kernels) > 30
    for kernel in kernels.values():
        validate(kernel.code)


@slow
def test_ifairy_logits_equal_the_published_formulas(build_ifairy):
    artifact, source = build_ifairy("float32")
    expected = Published(source, int8=False).logits(TOKENS)
    with fc.load(artifact) as model:
        assert str(model.engine.device).startswith("vulkan")
        assert relative_error(model.logits(TOKENS), expected) <= FLOAT32_TOLERANCE


@slow
def test_ifairy_logits_with_a_float16_cache_equal_those_of_a_cpu(build_ifairy, tmp_path):
    """Rounding keys and values moves some of this model's logits by 0.06, on any target alike."""
    artifact, source = build_ifairy("float16")
    sizes = {"context": 128, "prefill_chunk": 32}
    fc.build(
        source, target="cpu", act="float", kv_dtype="float16", output=tmp_path / "cpu", **sizes
    )
    with fc.load(tmp_path / "cpu") as cpu, fc.load(artifact) as vulkan:
        tolerance = FLOAT16_TOLERANCE / 10
        np.testing.assert_allclose(
            vulkan.logits(TOKENS), cpu.logits(TOKENS), rtol=0, atol=tolerance
        )
