"""Rotary embedding and append on a simulated CUDA device: apart, and within decode attention.

Arithmetic is float32: cos and sin err by 2 u, u = 2^-24, products and their sum by u each. So a
rotated element errs by 5 u (|a| + |b|) amplitude, and by the rounding to the cache's dtype.
"""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels import cuda_attention
from fairy_compile.kernels.attention_shape import PAGE, AttentionShape
from fairy_compile.kernels.rotate_append import build_rotate_append
from fairy_compile.op.rope import RopeTable, rope_table
from tests.emulation import cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_cases import call, compile_functions, host_target

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


def table(rotary_dim: int, amplitude: float = 1.0) -> RopeTable:
    plain = rope_table("default", 10000.0, rotary_dim, {}, 4096)
    return RopeTable(plain.frequencies, amplitude)


# Whole heads, groups that share keys, a part of each head, amplitudes, windows and caps.
CASES = [
    (AttentionShape(4, 4, 128, "float16"), table(128)),
    (AttentionShape(6, 2, 64, "float16"), table(32, 1.19)),
    (AttentionShape(5, 1, 32, "float32"), table(32)),
    (AttentionShape(4, 2, 64, "float32", window=37, softcap=20.0), table(48, 0.5)),
    (AttentionShape(2, 1, 256, "float16", window=20), table(256)),
]
LENGTHS = [(1,), (16, 17, 300), (5, 40, 16, 33, 2) * 3 + (90, 1)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


class Batch:
    """Random rows of qkv for sequences in random pages."""

    def __init__(self, shape: AttentionShape, lengths: tuple[int, ...], dtype: str) -> None:
        rng = np.random.default_rng(4)
        counts = [-(-length // PAGE) for length in lengths]
        pages = sum(counts) + 3
        size = (pages, 2, shape.kv_heads, PAGE, shape.head_dim)
        self.pages = rng.standard_normal(size).astype(shape.dtype)
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.values = rng.permutation(pages).astype(np.int32)  # more than sequences have
        self.positions = np.array(lengths, np.int32) - 1
        self.last_page = self.positions % PAGE + 1
        last = self.values[self.indptr[1:] - 1]
        self.places = last * PAGE + self.positions % PAGE
        every = shape.heads + 2 * shape.kv_heads
        self.qkv = rng.standard_normal((len(lengths), every, shape.head_dim)).astype(dtype)


def rotated(x: np.ndarray, positions: np.ndarray, rope: RopeTable) -> tuple[np.ndarray, np.ndarray]:
    """Return x (n, heads, head_dim) rotated in float64, and |a| + |b| of every pair."""
    half = len(rope.frequencies)
    angles = (positions[:, None].astype(np.float32) * rope.array()).astype(np.float64)
    turn = np.exp(1j * angles)[:, None] * rope.amplitude
    x = x.astype(np.float64)
    a, b = x[..., :half], x[..., half : 2 * half]
    y = (a + 1j * b) * turn
    size = (np.abs(a) + np.abs(b)) * rope.amplitude
    rest = x[..., 2 * half :]
    return (
        np.concatenate([y.real, y.imag, rest], axis=-1),
        np.concatenate([size, size, 0 * rest], axis=-1),
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(("shape", "rope"), CASES, ids=str)
def test_append_equals_numpy(rig, tmp_path, shape: AttentionShape, rope, lengths) -> None:
    target, batch = host_target("cuda"), Batch(shape, lengths, "float32")
    batch.qkv[0] *= 1e6  # more than float16 holds
    kernel = build_rotate_append(shape, rope, "float32")
    library = compile_functions({"rotate_append": kernel}, target, tmp_path)
    arrays = [batch.qkv, batch.positions, batch.places, rope.array(), batch.pages]
    q = np.zeros((len(lengths), shape.heads, shape.head_dim), shape.dtype)
    *_, pages, q = call(library, "rotate_append", target, [*arrays, q], ())
    heads, keys = shape.heads, shape.heads + shape.kv_heads
    turned, size = rotated(batch.qkv[:, :keys], batch.positions, rope)
    want = np.concatenate([turned, batch.qkv[:, keys:]], axis=1)
    allowed = np.zeros(want.shape)
    allowed[:, :keys] = 5 * 2.0**-24 * size
    if shape.dtype == "float16":
        allowed += 2.0**-11 * np.abs(want) + 2.0**-25
        want = np.clip(want, -65504, 65504)
    assert np.all(np.abs(q - want[:, :heads]) <= allowed[:, :heads])
    slots = pages.transpose(0, 3, 1, 2, 4).reshape(-1, 2, shape.kv_heads, shape.head_dim)
    before = batch.pages.transpose(0, 3, 1, 2, 4).reshape(slots.shape)
    new = slots[batch.places].reshape(len(lengths), -1, shape.head_dim)
    assert np.all(np.abs(new - want[:, heads:]) <= allowed[:, heads:])
    others = np.delete(np.arange(len(slots)), batch.places)
    np.testing.assert_array_equal(slots[others], before[others])


@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize(("shape", "rope"), CASES, ids=str)
def test_attention_that_rotates_equals_append_and_attention(
    rig, tmp_path, monkeypatch, shape: AttentionShape, rope, lengths
) -> None:
    """Bit for bit, which `test_cuda_attention` and the test above compare with NumPy."""
    monkeypatch.setattr(cuda_attention, "_PART_PAGES", 4)  # several parts of short contexts
    target, batch = host_target("cuda"), Batch(shape, lengths, shape.dtype)
    assert cuda_attention.rotates(shape, rope, shape.dtype)
    kernels = {
        "append": build_rotate_append(shape, rope, shape.dtype),
        "attention": cuda_attention.build_decode(shape, room=True),
        "rotating": cuda_attention.build_decode(shape, room=True, table=rope),
    }
    library = compile_functions(kernels, target, tmp_path)
    q = np.full((len(lengths), shape.heads, shape.head_dim), np.nan, shape.dtype)
    lse = np.full(q.shape[:2], np.nan, np.float32)
    parts = [
        np.full(len(lengths) * size, np.nan, np.float32)
        for size in cuda_attention.part_sizes(shape)
    ]
    tables = [batch.indptr, batch.values, batch.last_page, np.zeros_like(batch.positions)]
    tables.append(batch.positions)
    arrays = [batch.qkv, batch.positions, batch.places, rope.array(), batch.pages]
    *_, pages, queries = call(library, "append", target, [*arrays, q], ())
    scale = shape.head_dim**-0.5
    for signed in (scale, -scale) if shape.window else (scale,):
        scalars = (0, 1.0, 1e4, signed)
        arrays = [queries, pages, *tables, q, lse, *parts]
        want = call(library, "attention", target, arrays, scalars)[7:9]
        arrays = [batch.qkv, batch.pages, *tables, batch.places, rope.array(), q, lse, *parts]
        results = call(library, "rotating", target, arrays, scalars)
        np.testing.assert_array_equal(results[1], pages)
        for got, expected in zip(results[9:11], want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_what_attention_does_not_rotate() -> None:
    """Halves that are no whole units of 128 bits, and activations of another dtype."""
    shape = AttentionShape(4, 4, 64, "float16")
    assert cuda_attention.rotates(shape, table(48), "float16")
    assert not cuda_attention.rotates(shape, table(40), "float16")
    assert not cuda_attention.rotates(shape, table(48), "bfloat16")
    assert not cuda_attention.rotates(AttentionShape(4, 4, 96, "float16"), table(96), "float16")


def test_names_tell_rotations_apart() -> None:
    shape = CASES[0][0]
    ropes = [None, table(128), table(64), table(128, 1.5)]
    names = {cuda_attention.render(shape, rope)[0] for rope in ropes}
    assert len(names) == len(ropes)
    assert all(name.isidentifier() for name in names)
