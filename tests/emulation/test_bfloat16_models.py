"""Whole models with bfloat16 activations on simulated devices, against PyTorch in float32.

Roundings to 8 bits are by at most u = 2^-8 and by 0.43 u in root mean square; where they are
independent, n of them err by sqrt(n) times that. The bound here is sqrt(n) u: it leaves a factor of
2.3 for layers that amplify what comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.compiler import cuda_binary, pipeline
from tests.emulation import cuda_library, cuda_rig, metal_rig, opencl_rig
from tests.emulation.gpu_targets import use_linux_host
from tests.tiny_models import SIZES, Oracle, relative_error, save_model, scale_hidden_states

pytestmark = pytest.mark.slow
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()
# Activations of a layer that are rounded: outputs of four linear calls, of attention and of the
# gate's product, two norms and two sums; Gemma has two norms more, and those of queries and keys.
ROUNDINGS = {"llama": 10, "gemma3": 14}
CALLS = 4  # of a layer
WIDE = 2.0**16  # hidden states of this size are beyond float16's, the embedding's weights are not


def tolerance(family: str, rounded_weights: bool) -> float:
    """Return the bound, see above; ``rounded_weights`` of T = 2 are rounded three times."""
    layers = SIZES["num_hidden_layers"]
    count = layers * ROUNDINGS[family] + 2  # the embedding and the last norm
    if rounded_weights:
        count += 3 * (layers * CALLS + 1)
    return math.sqrt(count) * 2.0**-8


def check(source: Path, out: Path, family: str, rounded_weights: bool, exempt=()) -> None:
    """Compare prefill, and decode token by token, with PyTorch."""
    oracle = Oracle(source, fc.QuantConfig("w2", act="float", exempt=exempt))
    with fc.load(out) as model:
        error = relative_error(model.logits(TOKENS), oracle.logits(TOKENS))
        assert error <= tolerance(family, rounded_weights)
        sequence = model.engine.add_sequence()
        logits = [model.engine.prefill(sequence, TOKENS[:3])]
        logits += [model.engine.decode([sequence], [token])[0] for token in TOKENS[3:8]]
        error = relative_error(np.array(logits), oracle.logits(TOKENS[:8])[2:])
        assert error <= tolerance(family, rounded_weights)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Return build(source, target, **options) -> artifact that runs on this machine."""
    monkeypatch.setattr(pipeline, "machine_code", lambda target: nullcontext())
    monkeypatch.setattr(cuda_binary, "find_tool", lambda name: name)

    def make(source: Path, target: str, act_dtype: str = "bfloat16", **options) -> Path:
        use_linux_host(monkeypatch, tmp_path / "targets", target)
        out = tmp_path / act_dtype
        sizes = {"context": 128, "prefill_chunk": 32}
        fc.build(source, target=target, act_dtype=act_dtype, output=out, **options, **sizes)
        monkeypatch.undo()  # names of targets mean their files again
        return out

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture
def cuda(folder: Path) -> None:
    reason = cuda_rig.missing_tools() or metal_rig.missing_tools()
    if reason:
        pytest.skip(reason)
    cuda_library.CudaRig(folder)


def save_wide(directory: Path) -> Path:
    """Save a Gemma 3 whose hidden states reach 65504 many times over."""
    changes = {"sliding_window": 128, "tie_word_embeddings": False}
    save_model(directory, "gemma3", **changes)
    scale_hidden_states(directory, WIDE)
    return directory


@pytest.mark.parametrize("act", ["int16", "float"])
def test_cuda(cuda, build, tmp_path: Path, act: str) -> None:
    source = save_model(tmp_path / "model", "llama")
    check(source, build(source, "cuda", act=act), "llama", rounded_weights=act == "int16")


def test_cuda_beyond_float16(cuda, build, tmp_path: Path) -> None:
    """What bfloat16 computes as ever is no number in float16."""
    source = save_wide(tmp_path / "model")
    check(source, build(source, "cuda", act="int16"), "gemma3", rounded_weights=True)
    with fc.load(build(source, "cuda", "float16", act="int16")) as model:
        assert not np.isfinite(model.logits(TOKENS)).any()


@pytest.mark.skipif(metal_rig.missing_tools() is not None, reason=str(metal_rig.missing_tools()))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_metal(build, folder: Path, tmp_path: Path, family: str) -> None:
    metal_rig.MetalRig(folder)
    source, exempt = tmp_path / "model", ("*o_proj",)  # these multiply bfloat16 weights
    save_wide(source) if family == "gemma3" else save_model(source, family)
    out = build(source, "metal", exempt=exempt)
    check(source, out, family, rounded_weights=False, exempt=exempt)


@pytest.mark.skipif(opencl_rig.missing_tools() is not None, reason=str(opencl_rig.missing_tools()))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_opencl(build, folder: Path, tmp_path: Path, family: str) -> None:
    # PoCL has no float16, and is not to be trusted with heads of 32, see the rig.
    opencl_rig.OpenCLRig(folder, optimize=family != "gemma3")
    source = tmp_path / "model"
    save_wide(source) if family == "gemma3" else save_model(source, family)
    out = build(source, "opencl", kv_dtype="float32")
    check(source, out, family, rounded_weights=False)
