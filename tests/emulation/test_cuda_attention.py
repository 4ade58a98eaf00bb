"""Decode attention on a simulated CUDA device against float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fairy_compile.kernels import cuda_attention
from fairy_compile.kernels.cuda_attention import DecodeShape, build_decode
from tests.emulation import cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_cases import call, compile_functions, host_target

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

PAGE = 16
SHAPES = [
    DecodeShape(4, 4, 128, "float16"),
    DecodeShape(6, 2, 16, "float16"),
    DecodeShape(8, 1, 64, "float32"),
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


def attention(shape: DecodeShape, q, pages, tables, lengths, scale):
    """Return outputs and log-sum-exps, in units of log2, in float64."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -1e30)
    for b, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        if not length:
            continue
        keys, values = pages[table].astype(np.float64).transpose(1, 2, 0, 3, 4)[:, :]
        for h in range(shape.heads):
            kv = h // (shape.heads // shape.kv_heads)
            k, v = (x[kv].reshape(-1, shape.head_dim)[:length] for x in (keys, values))
            scores = k @ q[b, h].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[b, h] = weights @ v / weights.sum()
            lse[b, h] = (np.log(weights.sum()) + scores.max()) / np.log(2)
    return out, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [(1,), (70,), (600,), (5, 0, 300, 16)], ids=str)
def test_attention_equals_numpy(rig, tmp_path, monkeypatch, shape: DecodeShape, lengths) -> None:
    """Scores err by head_dim eps |q| |k|, weights by as much, sums by less than the number of keys.

    Numbers are about 1, so 1e-5 is allowed, and the rounding of outputs to float16.
    """
    monkeypatch.setattr(cuda_attention, "_PART_PAGES", 4)  # several parts of short contexts
    rng, target, batch = np.random.default_rng(0), host_target("cuda"), len(lengths)
    counts = [-(-length // PAGE) for length in lengths]
    room = sum(counts) + 3
    pages = rng.standard_normal((room, 2, shape.kv_heads, PAGE, shape.head_dim)).astype(shape.dtype)
    order = rng.permutation(room)[: sum(counts)].astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = np.array([(length - 1) % PAGE + 1 if length else 0 for length in lengths], np.int32)
    q = rng.standard_normal((batch, shape.heads, shape.head_dim)).astype(shape.dtype)
    zeros = np.zeros(batch, np.int32)
    scale = shape.head_dim**-0.5
    library = compile_functions({"attention": build_decode(shape)}, target, tmp_path)
    arrays = [q, pages, indptr, order, last, zeros, zeros, np.full_like(q, np.nan)]
    arrays.append(np.full((batch, shape.heads), np.nan, np.float32))
    *_, out, lse = call(library, "attention", target, arrays, (0, 1.0, 1e4, scale))
    tables = [order[a:b] for a, b in pairwise(indptr)]
    want, want_lse = attention(shape, q, pages, tables, lengths, scale)
    rounding = 2.0**-11 if shape.dtype == "float16" else 0
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=rounding, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
