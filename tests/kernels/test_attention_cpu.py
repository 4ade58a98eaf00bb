"""The CPU attention kernels against NumPy in float64, for several vector widths and head sizes."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pytest

from fairy_compile.kernels import attention_cpu as kernels
from fairy_compile.kernels.attention_cpu import VectorUnit
from tests.kernels.attention_cpu_cases import (
    AVX2,
    AVX512,
    CASES,
    LENGTHS,
    NEON,
    ONE_CASE,
    Paged,
    attention,
    call,
    check_prefill,
    compiled,
    each_case,
    random,
    tail,
    tolerance,
)


def run_decode(shape, unit, paged, q, rotary_mode=0):
    zero, lse = np.zeros(len(q), np.int32), np.zeros(q.shape[:2], np.float32)
    function = compiled(kernels.build_decode, shape, unit)
    arrays = (q, paged.pages, paged.indptr, paged.values, paged.last, zero, zero)
    result = call(function, *arrays, np.zeros_like(q), lse, *tail(shape, rotary_mode))
    return result[7], result[8]


@each_case
def test_decode_attends_over_each_sequence(shape, unit) -> None:
    paged = Paged(shape)
    q = random(shape, len(LENGTHS), shape.heads, shape.head_dim)
    out, lse = run_decode(shape, unit, paged, q)
    for s, length in enumerate(LENGTHS):
        want, want_lse = attention(q[s], paged.k[s], paged.v[s], length)
        np.testing.assert_allclose(out[s], want, rtol=0, atol=tolerance(shape))
        np.testing.assert_allclose(lse[s], want_lse, rtol=0, atol=1e-5)


@each_case
def test_decode_does_not_depend_on_the_sequences_beside(shape, unit) -> None:
    """Bit for bit: a server's answers must not depend on its load."""
    paged = Paged(shape, lengths := (*LENGTHS, 200) * 12)  # more heads than a context has parts
    q = random(shape, len(lengths), shape.heads, shape.head_dim)
    together = run_decode(shape, unit, paged, q)
    for s in range(len(LENGTHS) + 1):
        alone = copy(paged)
        begin, end = paged.indptr[s : s + 2]
        alone.indptr = np.array([0, end - begin], np.int32)
        alone.values, alone.last = paged.values[begin:end], paged.last[s : s + 1]
        out, lse = run_decode(shape, unit, alone, q[s : s + 1])
        np.testing.assert_array_equal(out[0], together[0][s])
        np.testing.assert_array_equal(lse[0], together[1][s])


def test_decode_of_an_empty_sequence_weighs_nothing() -> None:
    shape, unit = ONE_CASE
    paged = Paged(shape, (0, 20))
    q = random(shape, 2, shape.heads, shape.head_dim)
    out, lse = run_decode(shape, unit, paged, q)
    assert not out[0].any()
    assert (lse[0] < -1e29).all()
    assert np.isfinite(out[1]).all()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    shape, unit = CASES["mha-16-float32"]
    paged = Paged(shape, (40,))
    q = 300 * random(shape, 1, shape.heads, shape.head_dim)
    out, _ = run_decode(shape, unit, paged, q)
    want, _ = attention(q[0], paged.k[0], paged.v[0], 40)
    np.testing.assert_allclose(out[0], want, rtol=0, atol=1e-3)


@each_case
@pytest.mark.parametrize("causal", [0, 1])
def test_paged_prefill_attends_over_the_cache(shape, unit, causal: int) -> None:
    paged = Paged(shape)
    counts = [min(n, 35) for n in LENGTHS]
    indptr = np.cumsum([0, *counts]).astype(np.int32)
    q = random(shape, sum(counts), shape.heads, shape.head_dim)
    zero, positions = np.zeros(len(counts), np.int32), np.zeros(len(q), np.int32)
    result = call(
        compiled(kernels.build_paged_prefill, shape, unit),
        *(q, indptr, paged.pages, paged.indptr, paged.values, paged.last, zero, positions),
        *(np.zeros_like(q), np.zeros(q.shape[:2], np.float32), causal, *tail(shape)),
    )
    check_prefill(shape, q, indptr, paged.k, paged.v, causal, result[8], result[9])


@each_case
def test_ragged_prefill_attends_over_the_new_keys(shape, unit) -> None:
    paged = Paged(shape, (1, 9, 32, 47))
    indptr = np.cumsum([0, *map(len, paged.k)]).astype(np.int32)
    k, v = np.concatenate(paged.k), np.concatenate(paged.v)
    q = random(shape, len(k), shape.heads, shape.head_dim)
    zero, positions = np.zeros(4, np.int32), np.zeros(len(q), np.int32)
    result = call(
        compiled(kernels.build_ragged_prefill, shape, unit),
        *(q, indptr, k, v, indptr, positions, zero),
        *(np.zeros_like(q), np.zeros(q.shape[:2], np.float32), 1, *tail(shape)),
    )
    check_prefill(shape, q, indptr, paged.k, paged.v, 1, result[7], result[8])


def windowed(case: str, window: int | None, softcap: float | None):
    shape, unit = CASES[case]
    return replace(shape, window=window, softcap=softcap), unit


def masked_attention(shape, q, k, v, first, end):
    """Return `attention` over keys first .. end - 1, with capped scores if the shape has a cap."""
    group = shape.group
    k, v = (np.repeat(x[first:end].astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q.astype(np.float64), k) / math.sqrt(shape.head_dim)
    if shape.softcap:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    weights = np.exp(scores)
    total = weights.sum(axis=1, keepdims=True)
    return np.einsum("hn,nhd->hd", weights / total, v), np.log2(total)[:, 0]


WINDOWS = [("mha-16-float32", 1), ("gqa2-64-float16", 20), ("gqa4-80-float32", 64)]
# The head's size gives scores of about 1, so that a cap of 1.5 bends them.
FEATURES = [*((case, window, None) for case, window in WINDOWS), ("gqa2-64-float16", None, 1.5),
            ("gqa3-6-float32", 40, 1.5)]  # fmt: skip
each_feature = pytest.mark.parametrize(("case", "window", "softcap"), FEATURES)


@each_feature
@pytest.mark.parametrize("local", [False, True])
def test_decode_in_windows_and_with_capped_scores(case, window, softcap, local) -> None:
    shape, unit = windowed(case, window, softcap)
    paged = Paged(shape)
    q = random(shape, len(LENGTHS), shape.heads, shape.head_dim)
    position = np.array([n - 1 for n in LENGTHS], np.int32)
    scale = shape.head_dim**-0.5 * (-1 if local else 1)
    result = call(
        compiled(kernels.build_decode, shape, unit),
        *(q, paged.pages, paged.indptr, paged.values, paged.last, np.zeros_like(position)),
        *(position, np.zeros_like(q), np.zeros(q.shape[:2], np.float32), 0, 1.0, 1e4, scale),
    )
    for s, length in enumerate(LENGTHS):
        first = max(0, length - window) if local and window else 0
        want, lse = masked_attention(shape, q[s], paged.k[s], paged.v[s], first, length)
        np.testing.assert_allclose(result[7][s], want, rtol=0, atol=tolerance(shape))
        np.testing.assert_allclose(result[8][s], lse, rtol=0, atol=1e-5)


@each_feature
@pytest.mark.parametrize("past", [0, 5, 31])
def test_prefill_in_windows_and_with_capped_scores(case, window, softcap, past: int) -> None:
    """New keys by the ragged kernel, earlier ones by the paged one, which may be out of sight."""
    shape, unit = windowed(case, window, softcap)
    scale, lengths = -(shape.head_dim**-0.5), (1, 9, 32, 47)
    paged = Paged(shape, tuple(past + n for n in lengths))
    cached = Paged(shape, (past,) * len(lengths))
    for s in range(len(lengths)):
        cached.k[s], cached.v[s] = paged.k[s][:past], paged.v[s][:past]
    cached.fill()
    indptr = np.cumsum([0, *lengths]).astype(np.int32)
    offset = np.full(len(lengths), past, np.int32)
    position = np.concatenate([past + np.arange(n) for n in lengths]).astype(np.int32)
    q = random(shape, len(position), shape.heads, shape.head_dim)
    k, v = (np.concatenate([x[past:] for x in part]) for part in (paged.k, paged.v))
    new = call(
        compiled(kernels.build_ragged_prefill, shape, unit),
        *(q, indptr, k, v, indptr, position, offset),
        *(np.zeros_like(q), np.zeros(q.shape[:2], np.float32), 1, 0, 1.0, 1e4, scale),
    )[7:9]
    old = call(
        compiled(kernels.build_paged_prefill, shape, unit),
        *(q, indptr, cached.pages, cached.indptr, cached.values, cached.last),
        *(np.zeros_like(offset), position),
        *(np.zeros_like(q), np.zeros(q.shape[:2], np.float32), 0, 0, 1.0, 1e4, scale),
    )[8:10]
    out, lse, *_ = call(compiled(kernels.build_merge, shape, unit), *new, *old)
    for s, n in enumerate(lengths):
        for i in range(n):
            row, end = indptr[s] + i, past + i + 1
            first = max(0, end - window) if window else 0
            want, want_lse = masked_attention(shape, q[row], paged.k[s], paged.v[s], first, end)
            np.testing.assert_allclose(out[row], want, rtol=0, atol=2 * tolerance(shape))
            np.testing.assert_allclose(lse[row], want_lse, rtol=0, atol=1e-5)


def test_windows_slid_by_the_runtime_are_refused() -> None:
    shape, unit = ONE_CASE
    paged = Paged(shape, (3,))
    q = random(shape, 1, shape.heads, shape.head_dim)
    with pytest.raises(RuntimeError, match="without sliding-window attention"):
        run_decode(shape, unit, paged, q, rotary_mode=1)


@pytest.mark.parametrize("rows", [3, 20])
def test_merged_halves_equal_the_whole(rows: int) -> None:
    shape, unit = CASES["mha-16-float32"]
    q = random(shape, rows, shape.heads, shape.head_dim)
    k, v = (random(shape, 30, shape.kv_heads, shape.head_dim, seed=s) for s in (1, 2))
    first = [attention(row, k[:11], v[:11], 11) for row in q]
    second = [attention(row, k[11:], v[11:], 19) for row in q]
    arrays = [np.stack([p[i] for p in part]).astype(np.float32) for part in (first, second)
              for i in (0, 1)]  # fmt: skip
    out, lse, *_ = call(compiled(kernels.build_merge, shape, unit), *arrays)
    for row in range(rows):
        want, want_lse = attention(q[row], k, v, 30)
        np.testing.assert_allclose(out[row], want, rtol=0, atol=3e-6)
        np.testing.assert_allclose(lse[row], want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "unit"), [({"avx512f"}, AVX512), ({"avx2"}, AVX2), ({"neon"}, NEON)]
)
def test_vector_unit_follows_the_target(features: set[str], unit: VectorUnit) -> None:
    from fairy_compile.targets import Target

    target = Target("test", "", {"kind": "llvm"}, frozenset(features), ())
    assert kernels.vector_unit(target) == unit
