"""What our attention kernels for GPUs share: sizes, sliding windows, capped scores, keys.

TVM's kernels serve GPUs where a model attends over all keys. These serve what those lack: layers
with sliding windows, capped scores, and sizes whose elements or heads they leave out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.attention_shape import LOG2_E, PAGE, AttentionShape
from fairy_compile.kernels.gpu_builder import load_float, local, store

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

THREADS = 128
"""Threads of a group."""

LAST = 1 << 30
"""A position that no context reaches, nor the window of a layer that has none."""


def vector(head_dim: int) -> int:
    """Return how many neighbouring elements of a head are read at a time."""
    return math.gcd(head_dim, 4)


def window_of(shape: AttentionShape, sm_scale: Expr) -> Expr | None:
    """Return the window of the layer of this call, on the host; None if no layer has one."""
    if shape.window is None:
        return None
    return T.bind(T.if_then_else(sm_scale < 0, T.int32(shape.window), T.int32(LAST)))


def query_scale(shape: AttentionShape, sm_scale: Expr) -> Expr:
    """Return the factor of scores, on the host."""
    return T.bind(T.max(sm_scale, -sm_scale) * T.float32(shape.score_unit))


def capped(shape: AttentionShape, score: Expr) -> Expr:
    """Return log2(e) cap tanh(s / cap) of a score of a scaled query, see `query_scale`."""
    if not shape.softcap:
        return score
    # tanh x = 1 - 2 / (e^2x + 1), which is 1 to float32 long before the power overflows.
    power = T.exp2(T.min(score, T.float32(64)))
    tanh = T.float32(1) - T.float32(2) / (power + T.float32(1))
    return T.float32(shape.softcap * LOG2_E) * tanh


def first_key(window: Expr | None, position: Expr, offset: Expr) -> Expr:
    """Return the first key that a query sees; it may lie beyond the last there is.

    Args:
        window: see `window_of`.
        position: of the query in its sequence.
        offset: position of key 0.
    """
    if window is None:
        return T.int32(0)
    return T.max(position - (window - 1) - offset, T.int32(0))


def load_vector(buffer: Buffer, at: tuple[Any, ...], into: Buffer, place: int, lanes: int) -> None:
    """Load ``lanes`` neighbours as float32 into registers from ``place`` on."""
    *lead, last = at
    if lanes == 1:
        store(into, place, load_float(buffer, *at))
        return
    value = buffer[(*lead, T.ramp(last, 1, lanes))]
    if str(buffer.dtype) != "float32":
        value = T.cast(value, f"float32x{lanes}")
    store(into, T.ramp(place, 1, lanes), value)


class Keys:
    """Keys and values of a sequence, in pages of the cache or one after the other.

    Args:
        pages: (p, 2, kv_heads, 16, head_dim), or None.
        page_values: int32, pages of all sequences.
        k, v: (m, kv_heads, head_dim), where there are no pages.
        begin: of the sequence, in ``page_values`` or in the rows of k and v.
        head: of keys and values.
    """

    def __init__(
        self,
        begin: Expr,
        head: Expr,
        *,
        pages: Buffer | None = None,
        page_values: Buffer | None = None,
        k: Buffer | None = None,
        v: Buffer | None = None,
    ) -> None:
        self.begin, self.head = begin, head
        self.pages, self.page_values = pages, page_values
        self.k, self.v = k, v

    def place(self, key: Expr) -> tuple[Any, ...]:
        """Return where a key's row lies; what reads it takes this."""
        if self.pages is None:
            return (self.begin + key,)
        page = keep(self.page_values[self.begin + T.shift_right(key, T.int32(4))])
        return page, T.bitwise_and(key, T.int32(PAGE - 1))

    def load(
        self, which: int, place: tuple[Any, ...], at: Any, into: Buffer, to: int, lanes: int
    ) -> None:
        """Load elements from ``at`` on of a key (``which`` 0) or value (1) into registers."""
        if self.pages is None:
            rows = self.v if which else self.k
            load_vector(rows, (*place, self.head, at), into, to, lanes)
            return
        page, row = place
        load_vector(self.pages, (page, which, self.head, row, at), into, to, lanes)


def registers(count: int, value: float = 0.0) -> Buffer:
    """Return ``count`` registers of float32 with a value."""
    made = local((count,))
    for i in range(count):
        store(made, i, T.float32(value))
    return made


def keep(value: Expr) -> Expr:
    """Return an int32 value that is computed here, once.

    What is bound to a name TVM computes again wherever it simplifies the name away.
    """
    register = local((1,), "int32")
    store(register, 0, value)
    return register[0]


def as_dtype(value: Expr, dtype: str) -> Expr:
    """Return a float32 value as ``dtype``."""
    return value if dtype == "float32" else T.cast(value, dtype)
