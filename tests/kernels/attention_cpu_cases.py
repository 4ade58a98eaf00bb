"""Shapes, paged keys and values and the NumPy reference for tests of the CPU attention kernels."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import tvm

from fairy_compile.kernels.attention_cpu import AttentionShape, VectorUnit
from fairy_compile.targets import load_target

PAGE = 16
AVX512, AVX2, NEON = VectorUnit(16, 16), VectorUnit(8, 8), VectorUnit(4, 16)
# One token, less than a page, whole pages, one more, and several parts of the decode kernel.
LENGTHS = (1, 15, 16, 33, 300)
# Query heads per key/value head 1, 2, 3, 4 and 8; head sizes down to ones no vector divides.
CASES = {
    "mha-16-float32": (AttentionShape(2, 2, 16, "float32"), AVX512),
    "gqa2-64-float16": (AttentionShape(4, 2, 64, "float16"), AVX2),
    "gqa4-80-float32": (AttentionShape(4, 1, 80, "float32"), NEON),
    "gqa8-128-float16": (AttentionShape(8, 1, 128, "float16"), AVX512),
    "gqa3-6-float32": (AttentionShape(3, 1, 6, "float32"), AVX2),
}
each_case = pytest.mark.parametrize(("shape", "unit"), CASES.values(), ids=CASES)
ONE_CASE = CASES["gqa2-64-float16"]


@cache
def compiled(build, shape: AttentionShape, unit: VectorUnit, *extra):
    function = build(shape, unit, *extra)
    if "global_symbol" not in function.attrs:
        function = function.with_attr("global_symbol", "function")
    library = tvm.compile(function, target=load_target("cpu").to_tvm())
    return library[function.attrs["global_symbol"]]


def call(function, *arguments) -> list[np.ndarray]:
    """Call with NumPy arrays and return them as they are afterwards."""
    tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    function(*tensors)
    return [
        t.numpy() if isinstance(a, np.ndarray) else a
        for t, a in zip(tensors, arguments, strict=True)
    ]


def random(shape: AttentionShape, *sizes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(sizes).astype(shape.dtype)


def tolerance(shape: AttentionShape) -> float:
    """Values are of size 1: half a unit in the last place of the output, and float32 sums."""
    return (2**-11 * 4 if shape.dtype == "float16" else 0) + 3e-6


def attention(q, k, v, visible) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 (heads, dim) and the log2 of the sum of exponentials, (heads,).

    q (heads, dim) sees the first ``visible`` rows of k and v (n, kv_heads, dim).
    """
    group = q.shape[0] // k.shape[1]
    k, v = (np.repeat(x[:visible].astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q.astype(np.float64), k) / math.sqrt(q.shape[1])
    peak = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=1, keepdims=True)
    out = np.einsum("hn,nhd->hd", weights / total, v)
    return out, (peak + np.log(total))[:, 0] / math.log(2)


class Paged:
    """Sequences of keys and values in pages, in random order; unused rows are NaN."""

    def __init__(self, shape: AttentionShape, lengths=LENGTHS) -> None:
        rng = np.random.default_rng(1)
        self.k, self.v = (
            [random(shape, n, shape.kv_heads, shape.head_dim, seed=s + n) for n in lengths]
            for s in (10, 20)
        )
        counts = [-(-n // PAGE) for n in lengths]
        self.indptr = np.cumsum([0, *counts]).astype(np.int32)
        self.values = rng.permutation(sum(counts)).astype(np.int32)
        size = (sum(counts), 2, shape.kv_heads, PAGE, shape.head_dim)
        self.pages = np.full(size, np.nan, shape.dtype)
        self.last = np.array([(n - 1) % PAGE + 1 if n else 0 for n in lengths], np.int32)
        self.fill()

    def fill(self) -> None:
        for s, k in enumerate(self.k):
            for i in range(len(k)):
                page = self.values[self.indptr[s] + i // PAGE]
                self.pages[page, 0, :, i % PAGE] = self.k[s][i]
                self.pages[page, 1, :, i % PAGE] = self.v[s][i]


def tail(shape: AttentionShape, rotary_mode: int = 0) -> tuple:
    return (rotary_mode, 1.0, 1e4, shape.head_dim**-0.5)


def check_prefill(shape, q, indptr, keys, values, causal, out, lse) -> None:
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        count = indptr[s + 1] - indptr[s]
        for i in range(count):
            row = indptr[s] + i
            want, want_lse = attention(q[row], k, v, len(k) - count + i + 1 if causal else len(k))
            np.testing.assert_allclose(out[row], want, rtol=0, atol=tolerance(shape))
            np.testing.assert_allclose(lse[row], want_lse, rtol=0, atol=1e-5)
