"""The Vulkan phase kernels on lavapipe, against the NumPy reference."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm

from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.targets import Limits, load_target
from tests.emulation.vulkan_device import missing_driver, missing_validator, validate
from tests.emulation.vulkan_module import kernels_of
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec, make_x

(KERNEL,) = VULKAN_KERNELS
slow = pytest.mark.slow

# Their host is x86-64 Linux, which lavapipe tests run on. A subgroup of lavapipe has 8 threads.
TARGETS = {
    "generic": load_target("vulkan"),
    "subgroups": replace(load_target("vulkan-nvidia"), limits=Limits(1024, 32768, simd_width=8)),
}


@pytest.fixture(scope="module", autouse=True)
def lavapipe():
    reason = missing_driver() or missing_validator()
    if reason:
        pytest.skip(reason)
    from tests.emulation import vulkan_runtime

    vulkan_runtime.install()


@cache
def compiled(spec: PhaseSpec, batch: str, target: str, threads):
    knobs = {} if threads is None else {"threads": threads}
    function = KERNEL.build(spec, TARGETS[target], batch, knobs)
    executable = tvm.compile(
        function.with_attr("global_symbol", "main"), target=TARGETS[target].to_tvm()
    )
    for kernel in kernels_of(executable).values():
        validate(kernel.code)
    return executable


def check(spec: PhaseSpec, batch: int, target: str = "generic", threads=None, code=None) -> None:
    """Compare with the reference, within what rounding the sums and the operands may cost.

    A float32 sum of K products in any order errs by at most K eps sum |x a|; see
    ``test_generic.check`` for the bound of |a|. In float16 the tiled GEMM rounds every entry of the
    matrix, and outputs are rounded once.
    """
    parts = make_parts(spec, code=code)
    x = make_x(spec, batch).astype(spec.dtype)
    device = tvm.vulkan()
    arrays = KERNEL.layout.pack(parts, spec)
    y = tvm.runtime.tensor(np.full((batch, spec.out_features), np.nan, spec.out_dtype), device)
    compiled(spec, "single" if batch == 1 else "many", target, threads)(
        tvm.runtime.tensor(x, device),
        *(tvm.runtime.tensor(np.ascontiguousarray(a), device) for a in arrays.values()),
        y,
    )
    seen, exact = y.numpy().astype("float32"), x.astype("float32")
    want = phase_gemm_reference(exact, parts)
    largest = max(float(p.scales.max(axis=(2, 3, 4)).sum()) for p in parts)
    terms = spec.in_features + 2 * spec.stages * len(spec.terms)
    eps = terms * np.finfo("float32").eps
    if spec.dtype == "float16":
        eps += 2 * np.finfo("float16").eps
    bound = eps * largest * np.abs(exact).sum(axis=1, keepdims=True)
    assert (np.abs(seen - want) <= bound + np.finfo(spec.out_dtype).eps * np.abs(want)).all()


def spec_of(dtype: str, **options) -> PhaseSpec:
    return replace(make_spec(act="float", **options), dtype=dtype, out_dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_few_and_many_rows(dtype: str) -> None:
    for batch in (1, 17):
        check(spec_of(dtype, parts=(37, 4), m=70), batch)


@slow
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("terms", [BOTH, ONLY_W])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stages_and_terms(dtype: str, terms, stages: int, batch: int) -> None:
    scale = ("tensor", "row", "tile64", "tensor")[stages - 1]
    check(spec_of(dtype, parts=(37, 4), m=70, stages=stages, terms=terms, scale=scale), batch)


@pytest.mark.parametrize(
    ("parts", "m"),
    [((1,), 1), ((5, 3, 2), 200)]
    + [pytest.param(p, m, marks=slow) for p in ((1,), (64,), (130, 66)) for m in (16, 200)],
)
def test_odd_sizes(parts, m: int) -> None:
    for batch in (1, 9):
        check(spec_of("float32", parts=parts, m=m), batch)


@slow
@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_extreme_codes(code: int) -> None:
    check(spec_of("float32", parts=(6,), m=20), 2, code=code)


@pytest.mark.parametrize(
    ("threads", "batch"),
    [(32, 1)] + [pytest.param(*c, marks=slow) for c in ((16, 1), (32, 3), (64, 1))],
)
def test_sums_by_subgroup(threads: int, batch: int) -> None:
    spec = spec_of("float32", parts=(20, 5), m=130)
    knobs = {"threads": threads}
    assert "subgroupAdd" in str(KERNEL.build(spec, TARGETS["subgroups"], "single", knobs))
    check(spec, batch, "subgroups", threads)
