"""OpenCL on PoCL: phase kernels against NumPy, whole models against PyTorch.

In float32 and in bfloat16, which is stored as integers; float16 is none of PoCL's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm

import fairy_compile as fc
from fairy_compile.kernels import elementwise_gpu
from fairy_compile.kernels.opencl import OPENCL_KERNELS
from tests.emulation import opencl_rig
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
from tests.tiled_models import TILED_MODELS, largest_logit_error, save_tiled
from tests.tiny_models import SIZES, Oracle, relative_error, save_model

missing = opencl_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

KERNEL = OPENCL_KERNELS[0]
TOKENS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 45).tolist()


@pytest.fixture(scope="module", autouse=True)
def rig(tmp_path_factory: pytest.TempPathFactory) -> opencl_rig.OpenCLRig:
    return opencl_rig.OpenCLRig(tmp_path_factory.mktemp("opencl"))


def check(shape: tuple, batch: int, directory: Path, dtype: str = "float32", **options) -> None:
    spec, target = gpu_spec(shape, dtype), host_target("opencl")
    assert largest_error(KERNEL, spec, target, batch, directory, **options) <= 1


@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_phase_kernel_matches_reference(tmp_path: Path, shape: tuple, batch: int) -> None:
    check(shape, batch, tmp_path)


@pytest.mark.parametrize("size", [1.0, 1e5, 1e30])
def test_bfloat16_activations(tmp_path: Path, size: float) -> None:
    for batch in (1, 17):
        check(SHAPES[0], batch, tmp_path, "bfloat16", size=size)


def test_norms_read_bfloat16(tmp_path: Path) -> None:
    """Here numbers are bound to names, which TVM alone would read as integers."""
    target = host_target("opencl")
    function = elementwise_gpu.build_rms_norm(72, 1e-5, "bfloat16", "many")
    library = compile_functions({"norm": function}, target, tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 72)).astype(np.float32) * 2**17
    weight = np.linspace(0.5, 2, 72).astype(np.float32)
    x = x.astype("bfloat16")
    y = call(library, "norm", target, [x, weight, np.zeros_like(x)])[-1]
    exact = x.astype(np.float64)
    want = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True)) * weight
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=2.0**-8 + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize("shape", SHAPES[3:])
def test_every_shape_matches_reference(tmp_path: Path, shape: tuple, batch: int) -> None:
    check(shape, batch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_bfloat16(tmp_path: Path, shape: tuple, batch: int) -> None:
    check(shape, batch, tmp_path, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 9])
def test_extreme_codes(tmp_path: Path, batch: int, code: int) -> None:
    check(SHAPES[0], batch, tmp_path, code=code)


@pytest.mark.slow
@pytest.mark.parametrize("knob", list(KERNEL.knobs))
def test_every_knob_computes_the_same(tmp_path: Path, knob: str) -> None:
    for value in KERNEL.knobs[knob]:
        for batch in (1, 7):
            check(SHAPES[0], batch, tmp_path, knobs={knob: value})


@pytest.mark.parametrize("batch", ["single", "many"])
def test_float16_kernels_compile(tmp_path: Path, batch: str) -> None:
    spec, target = gpu_spec(SHAPES[0], "float16"), host_target("opencl")
    function = KERNEL.build(spec, target, batch, {}).with_attr("global_symbol", "main")
    built = tvm.tirx.build(tvm.IRModule({"main": function}), target=target.to_tvm())
    opencl_rig.compile_with_clang(built.imports[0].inspect_source(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "mistral_window"])
def test_whole_model_equals_pytorch(
    rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    use_linux_host(monkeypatch, tmp_path / "targets", "opencl")
    # PoCL is not to be trusted with heads of 32, see the rig.
    rig.optimize = not family.startswith("gemma")
    source = save_model(tmp_path / family, family)
    out = tmp_path / "out"
    fc.build(source, target="opencl", act="float", output=out, context=128, prefill_chunk=32)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    with fc.load(out) as model:
        assert relative_error(model.logits(TOKENS), oracle.logits(TOKENS)) <= 1e-4
        assert greedy(model, TOKENS[:5], 32) == oracle.greedy(TOKENS[:5], 32)
    assert any(name.startswith("opencl_words_single") for name in rig.launches)


@pytest.mark.slow
@pytest.mark.parametrize("name", TILED_MODELS)
def test_models_with_scales_a_tile_equal_pytorch(rig, monkeypatch, tmp_path, name: str) -> None:
    use_linux_host(monkeypatch, tmp_path / "targets", "opencl")
    source, oracle = save_tiled(name, tmp_path)
    out = tmp_path / "out"
    fc.build(source, target="opencl", act="float", output=out, context=128, prefill_chunk=32)
    with fc.load(out) as model:
        assert largest_logit_error(model, oracle) <= 1e-4
