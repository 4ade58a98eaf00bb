"""Attention over the cache on a simulated CUDA device against float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fairy_compile.kernels import cuda_attention, cuda_attention_prefill
from fairy_compile.kernels.cuda_attention import CacheShape, build_decode
from tests.emulation import cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_cases import call, compile_functions, host_target

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

PAGE = 16
SHAPES = [
    CacheShape(4, 4, 128, "float16"),
    CacheShape(6, 2, 16, "float16"),
    CacheShape(8, 1, 64, "float32"),
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


def attention(shape: CacheShape, q, pages, tables, lengths, scale):
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
def test_attention_equals_numpy(rig, tmp_path, monkeypatch, shape: CacheShape, lengths) -> None:
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


PREFILL = [CacheShape(2, 2, 128, "float16"), CacheShape(4, 2, 32, "float16")]
# (rows of queries, keys) of each sequence: whole tiles, short ones, a past, none at all.
SEQUENCES = [[(64, 64)], [(1, 1), (70, 70), (3, 50)], [(65, 200), (0, 16), (5, 0)]]


@pytest.mark.parametrize("shape", PREFILL, ids=str)
@pytest.mark.parametrize("sequences", SEQUENCES, ids=str)
@pytest.mark.parametrize("paged", [True, False])
def test_prefill_equals_numpy(rig, tmp_path, shape: CacheShape, sequences, paged: bool) -> None:
    """Weights are rounded to float16, by 2^-11 each: outputs err by that of the mean |value|."""
    rng, target, batch = np.random.default_rng(1), host_target("cuda"), len(sequences)
    queries, keys = (np.array(n) for n in zip(*sequences, strict=True))
    q = rng.standard_normal((queries.sum(), shape.heads, shape.head_dim)).astype(np.float16)
    total, size = int(keys.sum()), (shape.kv_heads, shape.head_dim)
    k, v = rng.standard_normal((2, max(total, 1), *size)).astype(np.float16)
    q_indptr, kv_indptr = (
        np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (queries, keys)
    )
    positions, zeros = np.zeros(len(q), np.int32), np.zeros(batch, np.int32)
    scale = shape.head_dim**-0.5
    if paged:
        build = cuda_attention_prefill.build_paged_prefill
        pages, order, indptr, last = in_pages(rng, k, v, kv_indptr)
        arrays = [q, q_indptr, pages, indptr, order, last, zeros, positions]
    else:
        build = cuda_attention_prefill.build_ragged_prefill
        arrays = [q, q_indptr, k, v, kv_indptr, positions, zeros]
    library = compile_functions({"attention": build(shape)}, target, tmp_path)
    results = [np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)]
    for causal in (1, 0) if paged else (1,):
        scalars = (causal, 0, 1.0, 1e4, scale)
        *_, out, lse = call(library, "attention", target, [*arrays, *results], scalars)
        for (a, b), (c, d) in zip(pairwise(q_indptr), pairwise(kv_indptr), strict=True):
            for row in range(a, b):
                seen = d - c - (b - 1 - row) if causal else d - c
                check_row(shape, q[row], k[c : c + max(seen, 0)], v, c, scale, out[row], lse[row])


def in_pages(rng, k, v, kv_indptr):
    """Return pages in random order, and the tables that find the keys there."""
    counts = [-(-(b - a) // PAGE) for a, b in pairwise(kv_indptr)]
    order = rng.permutation(sum(counts) + 2)[: sum(counts)].astype(np.int32)
    pages = rng.standard_normal((len(order) + 2, 2, k.shape[1], PAGE, k.shape[2])).astype(k.dtype)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    for b, (start, end) in enumerate(pairwise(kv_indptr)):
        for i in range(end - start):
            page = order[indptr[b] + i // PAGE]
            pages[page, 0, :, i % PAGE], pages[page, 1, :, i % PAGE] = k[start + i], v[start + i]
    last = np.array([(b - a - 1) % PAGE + 1 if b > a else 0 for a, b in pairwise(kv_indptr)])
    return pages, order, indptr, last.astype(np.int32)


def check_row(shape: CacheShape, q, keys, values, first: int, scale: float, out, lse) -> None:
    for h in range(shape.heads):
        if not len(keys):
            assert not out[h].any()
            assert lse[h] == np.float32(-1e30)
            continue
        kv = h // (shape.heads // shape.kv_heads)
        v = values[first : first + len(keys), kv].astype(np.float64)
        scores = keys[:, kv].astype(np.float64) @ q[h].astype(np.float64) * scale
        weights = np.exp(scores - scores.max())
        want = weights @ v / weights.sum()
        allowed = 2.0**-11 * (weights @ np.abs(v) / weights.sum() + np.abs(want)) + 1e-5
        assert np.all(np.abs(out[h] - want) <= allowed)
        want_lse = (np.log(weights.sum()) + scores.max()) / np.log(2)
        assert abs(lse[h] - want_lse) <= 1e-5 * (1 + abs(want_lse))
