"""The Vulkan benchmark: its reference against the packed layout, and what it takes for wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.vulkan_gpu import check, reference
from fairy_compile.kernels.gpu_layout import WordsLayout
from fairy_compile.op import phase_gemm_reference
from tests.kernels.cases import make_parts, make_spec, make_x


@pytest.mark.parametrize(("stages", "terms"), [(2, ("U", "W")), (1, ("U", "W")), (3, ("W",))])
def test_the_reference_agrees_with_the_layout(stages: int, terms: tuple[str, ...]) -> None:
    spec = make_spec((40,), 70, stages, terms, "tensor", act="float")
    parts, x = make_parts(spec), make_x(spec, 3)
    arrays = WordsLayout().pack(parts, spec)
    want = phase_gemm_reference(x, parts)
    got = reference(spec, arrays["codes"], arrays["scales"], x)
    # The entries of the layout's real matrix are sums rounded to float32.
    rounding = float(np.abs(x).sum(axis=1).max() * arrays["scales"].sum()) * 2.0**-23
    np.testing.assert_allclose(got.real, want[:, :40], rtol=0, atol=rounding)
    np.testing.assert_allclose(got.imag, want[:, 40:], rtol=0, atol=rounding)


def test_wrong_outputs_are_seen() -> None:
    spec = replace(make_spec((40,), 64, 2, ("U", "W"), "tensor", act="float"), dtype="float32")
    parts, x = make_parts(spec), make_x(spec, 2)
    arrays = WordsLayout().pack(parts, spec)
    y = phase_gemm_reference(x, parts)
    assert check(spec, arrays["codes"], arrays["scales"], x, y) < 1e-6
    y[1, 5] = np.nan
    assert np.isnan(check(spec, arrays["codes"], arrays["scales"], x, y))
    y[1, 5] = 1e3
    assert check(spec, arrays["codes"], arrays["scales"], x, y) > 0.1
