"""Portable vector code for the CPU attention kernels: no instruction-set intrinsics.

Vectors are explicit ramps of 2^k lanes, which LLVM maps to the registers there are. A width of one
is scalar code, so that every head size works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

    from fairy_compile.targets import Target

Load = Callable[["Expr | int", "Expr | int"], "Expr"]
"""load(row, first) -> the float32 lanes of ``row`` from element ``first`` on."""

_EXP2_DEGREE = 6


@dataclass(frozen=True)
class VectorUnit:
    """What the kernels know of a CPU's vector registers.

    Attributes:
        lanes: float32 lanes of a vector, a power of two.
        sums: accumulator vectors that fit the registers beside their operands, a power of two.
    """

    lanes: int
    sums: int

    def dividing(self, size: int) -> VectorUnit:
        """Return the widest unit of at most these lanes that divides ``size``."""
        return replace(self, lanes=math.gcd(size, self.lanes))


def vector_unit(target: Target) -> VectorUnit:
    """Return the vector unit of a CPU target: 32 registers on AVX512 and NEON, 16 on AVX2."""
    if target.has("avx512f") or target.has("avx512bw"):
        return VectorUnit(lanes=16, sums=16)
    if target.has("neon"):
        return VectorUnit(lanes=4, sums=16)
    return VectorUnit(lanes=8, sums=8)


def dtype_of(name: str, lanes: int) -> str:
    """Return the vector dtype, e.g. ``float32x8``."""
    return name if lanes == 1 else f"{name}x{lanes}"


def span(first: Expr | int, lanes: int) -> Expr | int:
    """Return the index of ``lanes`` consecutive elements."""
    return first if lanes == 1 else T.ramp(first, 1, lanes)


def splat(value: Expr | float, lanes: int) -> Expr:
    """Return ``value`` (float32) in every lane."""
    value = T.float32(value) if isinstance(value, (int, float)) else value
    return value if lanes == 1 else T.broadcast(value, lanes)


def store(buffer: Buffer, index: Any, value: Expr) -> None:
    """Store to ``buffer[index]``; a tuple has one index for each dimension."""
    T.buffer_store(buffer, value, list(index) if isinstance(index, tuple) else [index])


def load(buffer: Buffer, index: Sequence[Any], lanes: int) -> Expr:
    """Return ``lanes`` elements as float32; ``index[-1]`` is the first of them."""
    *outer, first = index
    value = buffer[(*outer, span(first, lanes))]
    if str(buffer.dtype) != "float32":
        value = T.cast(value, dtype_of("float32", lanes))
    return value


def save(buffer: Buffer, index: Sequence[Any], value: Expr, lanes: int) -> None:
    """Store ``lanes`` float32 values in the buffer's dtype from ``index[-1]`` on."""
    *outer, first = index
    if str(buffer.dtype) != "float32":
        value = T.cast(value, dtype_of(str(buffer.dtype), lanes))
    store(buffer, (*outer, span(first, lanes)), value)


def fill(buffer: Buffer, first: Expr | int, count: int, value: float, lanes: int) -> None:
    """Set ``count`` elements, a multiple of ``lanes``, of a float32 buffer."""
    with T.serial(0, count // lanes) as i:
        store(buffer, span(first + i * lanes, lanes), splat(value, lanes))


def zeros(count: int, lanes: int) -> list[Buffer]:
    """Return ``count`` zeroed accumulators, small enough for LLVM to keep in registers."""
    buffers = [T.alloc_buffer((lanes,), "float32") for _ in range(count)]
    for buffer in buffers:
        store(buffer, span(0, lanes), splat(0.0, lanes))
    return buffers


def exp2(x: Expr, lanes: int) -> Expr:
    """Return 2^x for x <= 127, to 2e-7 relative; below x = -126.5 it is 0.

    2^x = 2^n 2^f with n the nearest integer, which goes to the exponent bits, and |f| <= 1/2,
    where the Taylor polynomial of degree 6 is off by (ln 2 / 2)^7 / 7! = 1.2e-7.
    """
    x = T.bind(T.max(x, splat(-127.0, lanes)))
    n = T.bind(T.floor(x + splat(0.5, lanes)))
    f = T.bind(x - n)
    terms = [math.log(2) ** k / math.factorial(k) for k in range(_EXP2_DEGREE + 1)]
    value = splat(terms[-1], lanes)
    for term in reversed(terms[:-1]):
        value = value * f + splat(term, lanes)
    bias, shift = (_splat_int(v, lanes) for v in (127, 23))
    bits = T.shift_left(T.cast(n, dtype_of("int32", lanes)) + bias, shift)
    return T.bind(value * T.reinterpret(dtype_of("float32", lanes), bits))


def _splat_int(value: int, lanes: int) -> Expr:
    return T.int32(value) if lanes == 1 else T.broadcast(T.int32(value), lanes)


def lane_max(vector: Expr, lanes: int) -> Expr:
    """Return the largest lane."""
    if lanes == 1:
        return vector
    stride = lanes // 2
    while stride:
        vector = T.bind(vector)
        vector = T.max(vector, T.Shuffle([vector], [i ^ stride for i in range(lanes)]))
        stride //= 2
    return T.bind(T.Shuffle([T.bind(vector)], [0]))


def lane_sums(vectors: Sequence[Expr], lanes: int) -> Expr:
    """Return the lane sums of 2^k vectors, at most ``lanes`` of them, as one vector in order.

    A step adds the lanes with bit ``stride`` unset to those with it set, and packs the results of
    two vectors into one: n vectors cost about n - 1 packing steps, not n reductions.
    """
    values = [T.bind(v) for v in vectors]
    stride = lanes // 2
    while len(values) > 1:
        half = len(values) // 2
        values = [_pack_sums(values[i], values[i + half], stride, lanes) for i in range(half)]
        stride //= 2
    (value,) = values
    while stride:
        value = T.bind(value + T.Shuffle([value], [i ^ stride for i in range(lanes)]))
        stride //= 2
    if len(vectors) == lanes:
        return value
    return T.bind(T.Shuffle([value], list(range(0, lanes, lanes // len(vectors)))))


def _pack_sums(x: Expr, y: Expr, stride: int, lanes: int) -> Expr:
    unset = [i if not i & stride else lanes + (i ^ stride) for i in range(lanes)]
    is_set = [i | stride if not i & stride else lanes + i for i in range(lanes)]
    return T.bind(T.Shuffle([x, y], unset) + T.Shuffle([x, y], is_set))


def divisor_at_most(size: int, limit: int) -> int:
    """Return the largest divisor of ``size`` that is at most ``limit``."""
    return next(d for d in range(max(1, min(size, limit)), 0, -1) if size % d == 0)
