"""Attention over the cache on a simulated CUDA device against float64.

Capped scores are cap y log2(e), y = 1 - 2 / (p + 1), where p is e^(2 s / cap). With u = 2^-24, a
power errs by 2 u p, and moves y by u at most; p + 1 and the quotient, at most 2, are rounded by u
of themselves, y by u, and the product with a rounded constant by 2 u of itself. So a score errs by
8 u cap beside what s errs by, weights by as much of themselves, and outputs, which their sum
divides, by twice that of the mean |value|.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fairy_compile.kernels import cuda_attention, cuda_attention_prefill
from fairy_compile.kernels.attention_shape import AttentionShape
from fairy_compile.kernels.cuda_attention import build_decode
from tests.emulation import cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_cases import call, compile_functions, host_target

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

PAGE = 16
SHAPES = [
    AttentionShape(4, 4, 128, "float16"),
    AttentionShape(6, 2, 16, "float16"),
    AttentionShape(8, 1, 64, "float32"),
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


def attention(shape: AttentionShape, q, pages, tables, lengths, scale):
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
def test_attention_equals_numpy(rig, tmp_path, monkeypatch, shape: AttentionShape, lengths) -> None:
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


PREFILL = [AttentionShape(2, 2, 128, "float16"), AttentionShape(4, 2, 32, "float16")]
# (rows of queries, keys) of each sequence: whole tiles, short ones, a past, none at all.
SEQUENCES = [[(64, 64)], [(1, 1), (70, 70), (3, 50)], [(65, 200), (0, 16), (5, 0)]]


@pytest.mark.parametrize("shape", PREFILL, ids=str)
@pytest.mark.parametrize("sequences", SEQUENCES, ids=str)
@pytest.mark.parametrize("paged", [True, False])
def test_prefill_equals_numpy(rig, tmp_path, shape: AttentionShape, sequences, paged: bool) -> None:
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


def check_row(
    shape: AttentionShape,
    q,
    keys,
    values,
    first: int,
    scale: float,
    out,
    lse,
    errors: tuple[float, float] = (2.0**-11, 2.0**-11),
    size: float = 1,
) -> None:
    """Compare one row's results with attention over ``keys``, whose values begin at ``first``.

    ``errors`` are the rounding of weights and that of outputs, scores are about ``size``.
    """
    cap = shape.softcap
    cap_error = 8 * 2.0**-24 * cap if cap else 0
    for h in range(shape.heads):
        if not len(keys):
            assert not out[h].any()
            assert lse[h] == np.float32(-1e30)
            continue
        kv = h // (shape.heads // shape.kv_heads)
        v = values[first : first + len(keys), kv].astype(np.float64)
        scores = keys[:, kv].astype(np.float64) @ q[h].astype(np.float64) * scale
        if cap:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        want, mean = (weights @ x / weights.sum() for x in (v, np.abs(v)))
        allowed = (errors[0] + 2 * cap_error) * mean + errors[1] * np.abs(want) + 1e-5 * size
        assert np.all(np.abs(out[h] - want) <= allowed)
        want_lse = (np.log(weights.sum()) + scores.max()) / np.log(2)
        allowed_lse = 1e-5 * (size + abs(want_lse)) + cap_error / np.log(2)
        assert abs(lse[h] - want_lse) <= allowed_lse


# (shape, about what scores are: beyond the cap where there is one, far beyond a cap of 1.5).
FEATURES = [
    (AttentionShape(2, 2, 128, "float16", window=37), 1),
    (AttentionShape(3, 1, 16, "float16", window=1), 1),
    (AttentionShape(4, 1, 64, "float32", window=5, softcap=1.5), 30),
    (AttentionShape(2, 1, 64, "float16", softcap=50.0), 20),
    (AttentionShape(2, 2, 16, "float32", softcap=1.5), 1),
    (AttentionShape(2, 1, 256, "float16", window=5000, softcap=50.0), 20),
    (AttentionShape(2, 2, 32, "float32", window=48), 1),
]
# Lengths of contexts, and how many positions the query is past the last key: at it but for caches
# that hold the first part of a context only, which may be out of a window's sight.
CONTEXTS = [
    (300, 0),
    (70, 0),
    (1, 0),
    (16, 0),
    (0, 0),
    (37, 0),
    (38, 0),
    (90, 20),
    (90, 100),
    (33, 1),
]


@pytest.mark.parametrize(("shape", "size"), FEATURES, ids=str)
def test_decode_in_windows_and_with_capped_scores(rig, tmp_path, monkeypatch, shape, size) -> None:
    """All keys out of sight are NaN: weights of 0 would not hide that they were read."""
    monkeypatch.setattr(cuda_attention, "_PART_PAGES", 1)  # several parts of short windows
    rng, target = np.random.default_rng(2), host_target("cuda")
    errors = (0, 2.0**-11 if shape.dtype == "float16" else 0)
    library = compile_functions({"attention": build_decode(shape)}, target, tmp_path)
    for batch, local in itertools.product((1, 2, 17), (False, True) if shape.window else (False,)):
        lengths, ahead = np.array([CONTEXTS[i % len(CONTEXTS)] for i in range(batch)]).T
        offset = (3 + 7 * np.arange(batch)).astype(np.int32)
        position = (offset + np.maximum(lengths - 1, 0) + ahead).astype(np.int32)
        first = first_keys(shape, local, position, offset)
        q = (size * rng.standard_normal((batch, shape.heads, shape.head_dim))).astype(shape.dtype)
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        rows = (max(int(indptr[-1]), 1), shape.kv_heads, shape.head_dim)
        k, v = rng.standard_normal((2, *rows)).astype(shape.dtype)
        seen_k, seen_v = hide(k, indptr, first), hide(v, indptr, first)
        pages, order, page_indptr, last = in_pages(rng, seen_k, seen_v, indptr)
        results = [np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)]
        arrays = [q, pages, page_indptr, order, last, offset, position, *results]
        scale = shape.head_dim**-0.5
        scalars = (0, 1.0, 1e4, -scale if local else scale)
        *_, out, lse = call(library, "attention", target, arrays, scalars)
        for b in range(batch):
            c, d = indptr[b] + min(first[b], lengths[b]), indptr[b + 1]
            check_row(shape, q[b], k[c:d], v, c, scale, out[b], lse[b], errors, size)


def test_parts_of_a_context_are_cut_out_of_the_window(rig, tmp_path, monkeypatch) -> None:
    """Counted where parts are merged, as those that saw a key: one for each page of the window."""
    sources, lse = cuda_attention.read_files, "lse[row] = peak + log2f(total);"
    count = "int seen = 0; for (int i = 0; i < parts; ++i) seen += own_lse[i] > kEmpty; "

    def read_files(*names: str) -> str:
        text = sources(*names)
        assert text.count(lse) == 1
        return text.replace(lse, f"{{ {count} lse[row] = seen; }}")

    monkeypatch.setattr(cuda_attention, "_PART_PAGES", 1)
    monkeypatch.setattr(cuda_attention, "read_files", read_files)
    shape, target = AttentionShape(1, 1, 16, "float16", window=48), host_target("cuda")
    library = compile_functions({"attention": build_decode(shape)}, target, tmp_path)
    for length, scale, parts in ((320, -1.0, 3), (312, -1.0, 4), (312, 1.0, 20)):
        q = np.zeros((1, 1, 16), np.float16)
        k, v = np.zeros((2, length, 1, 16), np.float16)
        pages, order, indptr, last = in_pages(np.random.default_rng(0), k, v, [0, length])
        at = [np.array([i], np.int32) for i in (5, 5 + length - 1)]
        arrays = [q, pages, indptr, order, last, *at, q, np.zeros((1, 1), np.float32)]
        *_, seen = call(library, "attention", target, arrays, (0, 1.0, 1e4, scale))
        assert seen == parts


def first_keys(shape: AttentionShape, local: bool, position, offset) -> np.ndarray:
    """Return the first key that each query sees, which may be beyond the last one."""
    if not local:
        return np.zeros(len(position), np.int64)
    return np.maximum(position.astype(np.int64) - (shape.window - 1) - offset, 0)


def hide(rows: np.ndarray, indptr, counts) -> np.ndarray:
    """Return keys or values with NaN for the first ``counts`` ones of each sequence."""
    hidden = rows.copy()
    for (begin, end), count in zip(pairwise(indptr), counts, strict=True):
        hidden[begin : min(begin + count, end)] = np.nan
    return hidden


WINDOWED_PREFILL = [
    (AttentionShape(2, 2, 128, "float16", window=37), 1),
    (AttentionShape(4, 2, 32, "float16", window=1), 1),
    (AttentionShape(2, 1, 64, "float16", window=5, softcap=1.5), 30),
    (AttentionShape(2, 1, 32, "float16", softcap=50.0), 20),
    (AttentionShape(2, 1, 64, "float16", window=5000, softcap=50.0), 20),
]
# (new rows, keys before them) of each sequence.
CHUNKS = [[(70, 200)], [(3, 50), (65, 0)], [(i % 6, 9 * i) for i in range(17)]]


@pytest.mark.parametrize(("shape", "size"), WINDOWED_PREFILL, ids=str)
def test_prefill_in_windows_and_with_capped_scores(rig, tmp_path, monkeypatch, shape, size) -> None:
    """Over new keys as they are, over those before them in pages, and over both in pages.

    Tiles of 32 keys that no row of a sequence sees are NaN. Rows over past keys come in any order,
    as those of sequences that share pages.
    """
    monkeypatch.setattr(rig, "order", 7)
    rng, target, scale = np.random.default_rng(3), host_target("cuda"), shape.head_dim**-0.5
    functions = {
        "ragged": cuda_attention_prefill.build_ragged_prefill(shape),
        "paged": cuda_attention_prefill.build_paged_prefill(shape),
    }
    library = compile_functions(functions, target, tmp_path)
    layers = (False, True) if shape.window else (False,)
    for chunks, kind, local in itertools.product(CHUNKS, ("new", "past", "both"), layers):
        ragged, causal = kind == "new", int(kind != "past")
        new, past = np.array(chunks).T
        keys = {"new": new, "past": past, "both": new + past}[kind]
        start = 11 + 5 * np.arange(len(new))  # of the sequence's first key
        offset = (start + past if ragged else start).astype(np.int32)
        rows = [s + p + np.arange(n) for s, n, p in zip(start, new, past, strict=True)]
        if kind == "past":
            rows = [rng.permutation(r) for r in rows]
        position = np.concatenate(rows).astype(np.int32)
        q_indptr, kv_indptr = (
            np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (new, keys)
        )
        first = first_keys(shape, local, position, np.repeat(offset, new))
        shape_of = (shape.heads, shape.head_dim)
        q = (size * rng.standard_normal((len(position), *shape_of))).astype(np.float16)
        k, v = rng.standard_normal((2, sum(keys), shape.kv_heads, shape.head_dim)).astype(q.dtype)
        unseen = [min(first[a:b], default=0) // 32 * 32 for a, b in pairwise(q_indptr)]
        seen = [hide(x, kv_indptr, unseen) for x in (k, v)]
        if ragged:
            arrays = [q, q_indptr, *seen, kv_indptr, position, offset]
        else:
            pages, order, indptr, last = in_pages(rng, *seen, kv_indptr)
            arrays = [q, q_indptr, pages, indptr, order, last, offset, position]
        arrays += [np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)]
        scalars = (causal, 0, 1.0, 1e4, -scale if local else scale)
        name = "ragged" if ragged else "paged"
        *_, out, lse = call(library, name, target, arrays, scalars)
        for (a, b), (c, d) in zip(pairwise(q_indptr), pairwise(kv_indptr), strict=True):
            for row in range(a, b):
                end = d - (b - 1 - row) if causal else d
                begin = min(c + first[row], end)
                given = (q[row], k[begin:end], v, begin, scale, out[row], lse[row])
                check_row(shape, *given, size=size)


def test_functions_of_different_windows_and_caps_have_different_names() -> None:
    shapes = [
        replace(SHAPES[0], window=window, softcap=cap)
        for window in (None, 1, 15)
        for cap in (None, 5.0, 1.5, 50.0)
    ]
    for render in (
        cuda_attention.render,
        lambda shape: cuda_attention_prefill.render(shape, paged=True),
        lambda shape: cuda_attention_prefill.render(shape, paged=False),
    ):
        names = {render(shape)[0] for shape in shapes}
        assert len(names) == len(shapes)
        assert all(name.isidentifier() for name in names)
