"""The Vulkan phase kernels on lavapipe, against the NumPy reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fairy_compile.kernels import sampler_gpu, sort_gpu
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.targets import Limits, Target
from tests.emulation.gpu_cases import (
    SHAPES,
    call,
    compile_functions,
    gpu_spec,
    host_target,
    largest_error,
)
from tests.emulation.spirv_val import missing_validator, validate
from tests.emulation.vulkan_device import missing_driver
from tests.emulation.vulkan_module import kernels_in

(KERNEL,) = VULKAN_KERNELS
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def lavapipe() -> None:
    reason = missing_driver() or missing_validator()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()


def subgroup_target() -> Target:
    """Return a target with subgroups of 8 threads, as lavapipe has them."""
    return replace(host_target("vulkan-nvidia"), limits=Limits(1024, 32768, simd_width=8))


def error(
    shape: tuple, dtype: str, batch: int, folder: Path, target: Target | None = None, **options
) -> float:
    """See `largest_error`; the SPIR-V is validated, too."""
    target = target or host_target("vulkan")
    found = largest_error(KERNEL, gpu_spec(shape, dtype), target, batch, folder, **options)
    for library in folder.glob("*.so"):
        for kernel in kernels_in(library.read_bytes()).values():
            validate(kernel.code)
    return found


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [(dtype, batch) for dtype in ("float16", "float32", "bfloat16") for batch in (1, 17)],
)
def test_few_and_many_rows_match_the_reference(tmp_path: Path, dtype: str, batch: int) -> None:
    assert error(SHAPES[0], dtype, batch, tmp_path) <= 1


@slow
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_the_reference(tmp_path: Path, shape, dtype: str, batch: int) -> None:
    assert error(shape, dtype, batch, tmp_path) <= 1


def test_bfloat16_activations_beyond_float16(tmp_path: Path) -> None:
    for batch in (1, 17):
        assert error(SHAPES[0], "bfloat16", batch, tmp_path, size=1e30) <= 1


@slow
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_extreme_codes(tmp_path: Path, code: int) -> None:
    assert error(SHAPES[0], "float32", 2, tmp_path, code=code) <= 1


@pytest.mark.parametrize(
    ("threads", "batch"),
    [(32, 1)] + [pytest.param(*case, marks=slow) for case in ((16, 1), (32, 3), (64, 1))],
)
def test_sums_by_subgroup(tmp_path: Path, threads: int, batch: int) -> None:
    knobs, target = {"threads": threads}, subgroup_target()
    function = KERNEL.build(gpu_spec(SHAPES[0], "float32"), target, "single", knobs)
    assert "subgroupAdd" in str(function)
    assert error(SHAPES[0], "float32", batch, tmp_path, target, knobs=knobs) <= 1


def test_sampling_kernels(tmp_path: Path) -> None:
    target, vocab, rows, samples = host_target("vulkan"), 700, 2, 12
    functions = {
        "argsort": sort_gpu.build_argsort(vocab),
        "multinomial": sampler_gpu.build_multinomial(),
    }
    library = compile_functions(functions, target, tmp_path)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(vocab, 0.1), rows).astype(np.float32)
    width = sort_gpu.sort_width(vocab)
    _, ordered, index, *_ = call(library, "argsort", target, [
        probs, np.zeros_like(probs), np.zeros(probs.shape, np.int32),
        np.zeros((rows, width), np.float32), np.zeros((rows, width), np.int32),
    ])  # fmt: skip
    np.testing.assert_array_equal(ordered, -np.sort(-probs, axis=1))
    np.testing.assert_array_equal(np.take_along_axis(probs, index, 1), ordered)

    uniform = rng.random(samples).astype(np.float32)
    row_of = rng.integers(0, rows, samples).astype(np.int32)
    arrays = [probs, uniform, row_of, np.zeros(samples, np.int32)]
    *_, drawn = call(library, "multinomial", target, arrays)
    for u, row, token in zip(uniform, row_of, drawn, strict=True):
        sums = np.cumsum(probs[row].astype(np.float64)) / probs[row].sum()
        assert sums[token] >= u - 1e-5
        assert sums[token] - probs[row, token] <= u + 1e-5
