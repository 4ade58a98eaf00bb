"""Rotary embedding of queries and keys, and the append of keys and values to pages, in one launch.

The runtime's cache takes two launches for it, with keys and values written and read once more in
between. Rows come with where their keys go, as `runtime.pages` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.attention_cpu_decode import index_buffer
from fairy_compile.kernels.attention_gpu import as_dtype
from fairy_compile.kernels.attention_shape import FLOAT16_MAX, PAGE, AttentionShape
from fairy_compile.kernels.gpu_builder import THREADS, build_function, ceildiv, launch, store, when

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import PrimFunc

    from fairy_compile.op.rope import RopeTable


def build_rotate_append(shape: AttentionShape, table: RopeTable, dtype: str) -> PrimFunc:
    """Return ``rotate_append``.

    Arguments: qkv (n, heads + 2 kv_heads, head_dim), positions int32 (n,), places int32 (n,),
    frequencies float32 (rotary_dim / 2,), pages (p, 2, kv_heads, 16, head_dim), q (n, heads,
    head_dim). It writes q and, although that is among its inputs, to pages: keys and values of row
    i to slot ``places[i] % 16`` of page ``places[i] / 16``. Arithmetic is float32, and results that
    float16 cannot hold become its largest numbers.

    Args:
        shape: sizes, and the dtype of q and pages.
        table: rotary embedding, see `op.rope`.
        dtype: of qkv.
    """
    return build_function("rotate_append", _RotateAppend(shape, table, dtype).emit)


class _RotateAppend:
    def __init__(self, shape: AttentionShape, table: RopeTable, dtype: str) -> None:
        self.shape, self.table, self.dtype = shape, table, dtype

    def emit(self) -> None:
        """Take the arguments and emit the launch; a thread has two elements of a head."""
        shape, table = self.shape, self.table
        every, pairs = shape.heads + 2 * shape.kv_heads, shape.head_dim // 2
        half = table.rotary_dim // 2
        rows = T.int32()
        self.x = T.arg("qkv", T.buffer((rows, every, shape.head_dim), self.dtype))
        positions = T.arg("positions", index_buffer(rows))
        self.places = T.arg("places", index_buffer(rows))
        frequencies = T.arg("frequencies", T.buffer((half,), "float32"))
        page = (2, shape.kv_heads, PAGE, shape.head_dim)
        self.pages = T.arg("pages", T.buffer((T.int32(), *page), shape.dtype))
        self.q = T.arg("q", T.buffer((rows, shape.heads, shape.head_dim), shape.dtype))
        count = rows * (every * pairs)
        extents = {"blockIdx.x": ceildiv(count, THREADS), "threadIdx.x": THREADS}
        with launch(extents) as (block, thread):
            index = T.bind(block * THREADS + thread)
            with when(index < count):
                pair = T.bind(T.truncmod(index, T.int32(pairs)))
                head = T.bind(T.truncmod(T.truncdiv(index, T.int32(pairs)), T.int32(every)))
                row = T.bind(T.truncdiv(index, T.int32(pairs * every)))
                with T.If(T.And(pair < half, head < shape.heads + shape.kv_heads)):
                    with T.Then():
                        amplitude = T.float32(table.amplitude)
                        angle = T.bind(T.cast(positions[row], "float32") * frequencies[pair])
                        cosine = T.bind(T.cos(angle) * amplitude)
                        sine = T.bind(T.sin(angle) * amplitude)
                        a = T.bind(self._load(row, head, pair))
                        b = T.bind(self._load(row, head, pair + half))
                        self._store(row, head, pair, a * cosine - b * sine)
                        self._store(row, head, pair + half, b * cosine + a * sine)
                    with T.Else():  # elements that do not turn come after those that do
                        for i in (2 * pair, 2 * pair + 1):
                            self._store(row, head, i, self._load(row, head, i))

    def _load(self, row: Expr, head: Expr, i: Expr) -> Expr:
        return T.cast(self.x[row, head, i], "float32")

    def _store(self, row: Expr, head: Expr, i: Expr, value: Expr) -> None:
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        if self.shape.dtype == "float16" and self.dtype != "float16":
            limit = T.float32(FLOAT16_MAX)
            value = T.max(T.min(value, limit), -limit)
        value = as_dtype(value, self.shape.dtype)
        with T.If(head < heads):
            with T.Then():
                store(self.q, (row, head, i), value)
            with T.Else():
                kind = T.truncdiv(head - heads, T.int32(kv_heads))
                own = T.truncmod(head - heads, T.int32(kv_heads))
                page = T.shift_right(self.places[row], T.int32(4))
                slot = T.bitwise_and(self.places[row], T.int32(PAGE - 1))
                store(self.pages, (page, kind, own, slot, i), value)
