"""What surrounds CPU attention: pages of keys and values, and rotary embeddings, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels import attention_cpu as kernels
from fairy_compile.kernels.attention_cpu import AttentionShape
from fairy_compile.op.rope import RopeTable, rope_table, rotate
from tests.kernels.attention_cpu_cases import (
    AVX2,
    CASES,
    ONE_CASE,
    PAGE,
    call,
    compiled,
    random,
    tolerance,
)


@pytest.mark.parametrize("tokens", [3, 20])
def test_append_writes_rows_and_skips_minus_one(tokens: int) -> None:
    shape, unit = ONE_CASE
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
    shape, unit = ONE_CASE
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
