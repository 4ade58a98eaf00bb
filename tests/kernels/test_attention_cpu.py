"""The CPU attention kernels against NumPy in float64, for several vector widths and head sizes."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm

from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels import attention_cpu as kernels
from fairy_compile.kernels.attention_cpu import AttentionShape, VectorUnit
from fairy_compile.op.rope import RopeTable, rope_table, rotate
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
one_case = CASES["gqa2-64-float16"]


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
    shape, unit = one_case
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


def check_prefill(shape, q, indptr, keys, values, causal, out, lse) -> None:
    for s, (k, v) in enumerate(zip(keys, values, strict=True)):
        count = indptr[s + 1] - indptr[s]
        for i in range(count):
            row = indptr[s] + i
            want, want_lse = attention(q[row], k, v, len(k) - count + i + 1 if causal else len(k))
            np.testing.assert_allclose(out[row], want, rtol=0, atol=tolerance(shape))
            np.testing.assert_allclose(lse[row], want_lse, rtol=0, atol=1e-5)


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
    shape, unit = one_case
    paged = Paged(shape, (3,))
    q = random(shape, 1, shape.heads, shape.head_dim)
    with pytest.raises(RuntimeError, match="without sliding-window attention"):
        run_decode(shape, unit, paged, q, rotary_mode=1)


@pytest.mark.parametrize("tokens", [3, 20])
def test_append_writes_rows_and_skips_minus_one(tokens: int) -> None:
    shape, unit = one_case
    pages = np.zeros((4, 2, shape.kv_heads, PAGE, shape.head_dim), shape.dtype)
    k, v = (random(shape, tokens, shape.kv_heads, shape.head_dim, seed=s) for s in (1, 2))
    positions = np.random.default_rng(3).permutation(4 * PAGE)[:tokens].astype(np.int32)
    positions[1] = -1
    seen = call(compiled(kernels.build_append, shape, unit), pages, k, v, positions)[0]
    for token, position in enumerate(positions):
        if position >= 0:
            pages[position // PAGE, 0, :, position % PAGE] = k[token]
            pages[position // PAGE, 1, :, position % PAGE] = v[token]
    np.testing.assert_array_equal(seen, pages)


def test_pages_are_copied_compacted_and_read() -> None:
    shape, unit = one_case
    pages = random(shape, 4, 2, shape.kv_heads, PAGE, shape.head_dim)
    copied = call(compiled(kernels.build_copy_page, shape, unit), pages, 1, 3, 5)[0]
    want = pages.copy()
    want[3, :, :, :5] = pages[1, :, :, :5]
    np.testing.assert_array_equal(copied, want)

    moves = np.array([[17, 3, 40], [16, 2, 17]], np.int32)  # the third reuses the first's source
    indptr = np.array([0, 1, 3], np.int32)
    seen = call(compiled(kernels.build_compact, shape, unit), pages, indptr, moves, 2)[0]
    want = pages.copy()
    for source, target in moves.T:
        want[target // 16, :, :, target % 16] = want[source // 16, :, :, source % 16]
    np.testing.assert_array_equal(seen, want)

    positions = np.array([33, 0, 15], np.int32)
    empty = np.zeros((2, 3, shape.kv_heads, shape.head_dim), shape.dtype)
    read = compiled(kernels.build_read, shape, unit, 2)
    _, _, k, v, _ = call(read, pages, positions, empty, empty.copy(), 1)
    np.testing.assert_array_equal(k[1, 0], pages[2, 0, :, 1])
    np.testing.assert_array_equal(v[1, 2], pages[0, 1, :, 15])
    assert not k[0].any()


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


ROPES = {
    "whole": lambda dim: rope_table("default", 1e4, dim, {}, 1),
    "half": lambda dim: rope_table("default", 1e4, dim // 4 * 2, {}, 1),
    "louder": lambda dim: RopeTable(rope_table("default", 1e4, dim, {}, 1).frequencies, 1.25),
}


def rope_tolerance(shape: AttentionShape) -> float:
    """Values are of size 4; a float32 angle of 4000 is off by up to 2^-13."""
    return tolerance(shape) * 4 + 5 * 2**-13


@pytest.mark.parametrize("apply", [0, 1])
@pytest.mark.parametrize("case", ["gqa4-80-float32", "gqa2-64-float16"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_splits_and_rotates_pairs(case: str, apply: int, rope: str) -> None:
    shape, unit = CASES[case]
    table = ROPES[rope](shape.head_dim)
    heads, fused = shape.heads, shape.heads + 2 * shape.kv_heads
    qkv = random(shape, 11, fused, shape.head_dim)
    positions = np.array([*range(9), 200, 4000], np.int32)
    outputs = [np.zeros((11, n, shape.head_dim), shape.dtype)
               for n in (shape.heads, shape.kv_heads, shape.kv_heads)]  # fmt: skip
    function = compiled(kernels.build_rope, shape, unit, table)
    _, _, q, k, v, _ = call(function, qkv, positions, *outputs, apply)
    turned = rotate(qkv, positions, table) if apply else qkv.astype(np.float64)
    atol = rope_tolerance(shape)
    np.testing.assert_allclose(q, turned[:, :heads], rtol=0, atol=atol)
    np.testing.assert_allclose(k, turned[:, heads : heads + shape.kv_heads], rtol=0, atol=atol)
    np.testing.assert_array_equal(v, qkv[:, heads + shape.kv_heads :])


@pytest.mark.parametrize("rope", ROPES)
def test_rotate_turns_queries_and_keys_in_their_places(rope: str) -> None:
    shape, unit = CASES["gqa4-80-float32"]
    table, turning = ROPES[rope](shape.head_dim), shape.heads + shape.kv_heads
    qkv = random(shape, 11, turning + shape.kv_heads, shape.head_dim)
    positions = np.array([*range(9), 200, 4000], np.int32)
    function = compiled(kernels.build_rotate, shape, unit, table)
    out = call(function, qkv, positions, np.zeros_like(qkv))[2]
    want = rotate(qkv, positions, table)[:, :turning]
    np.testing.assert_allclose(out[:, :turning], want, rtol=0, atol=rope_tolerance(shape))
    np.testing.assert_array_equal(out[:, turning:], qkv[:, turning:])


def test_rope_of_more_than_a_head_is_refused() -> None:
    shape = AttentionShape(1, 1, 7, "float32")
    with pytest.raises(UnsupportedError, match="7"):
        kernels.build_rope(shape, AVX2, RopeTable((1.0,) * 4))


@pytest.mark.parametrize(
    ("features", "unit"), [({"avx512f"}, AVX512), ({"avx2"}, AVX2), ({"neon"}, NEON)]
)
def test_vector_unit_follows_the_target(features: set[str], unit: VectorUnit) -> None:
    from fairy_compile.targets import Target

    target = Target("test", "", {"kind": "llvm"}, frozenset(features), ())
    assert kernels.vector_unit(target) == unit
