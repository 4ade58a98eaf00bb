"""Random TIR expressions whose results are exact, so that llvm and lavapipe must agree bit by bit.

Integers of 8 and 16 bits wrap, which is exact. Wider ones must not overflow, signed or not: TVM
tells LLVM that they never do. Floats hold integers small enough that sums and products are exact in
any order. Both carry a bound of their magnitude that keeps them so. Divisors are nonzero and not
-1, shifts are below the width, conversions stay in range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from tvm import tirx

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FLOATS = ("float16", "float32")
TYPES = (*INTEGERS, *FLOATS)
LARGEST_EXACT = {"float16": 2**11, "float32": 2**24}
LEAF_BOUND = 8


@dataclass(frozen=True)
class Expression:
    """An expression, its type, and a bound of its magnitude; an integer may have any value."""

    node: Any
    dtype: str
    bound: int = 2**64


class RandomExpressions:
    """Draws expressions over one input of each type.

    Args:
        random: source of choices.
        inputs: type -> expression.
        compared: types that comparisons, minima and maxima may have.
    """

    def __init__(
        self, random: Random, inputs: dict[str, Any], compared: Sequence[str] = TYPES
    ) -> None:
        self._random = random
        self._inputs = inputs
        self._compared = compared

    def draw(self, dtype: str, depth: int) -> Expression:
        """Return an expression of at most the given depth."""
        random = self._random
        if depth == 0 or random.random() < 0.1:
            return self._leaf(dtype)
        choices = self._float_choices if dtype in FLOATS else self._integer_choices
        return random.choice(choices())(dtype, depth - 1)

    def _leaf(self, dtype: str) -> Expression:
        # No integer constants: TVM's folding refuses unsigned ones that come out negative.
        if dtype in INTEGERS:
            return Expression(self._inputs[dtype], dtype)
        if self._random.random() < 0.7:
            return Expression(self._inputs[dtype], dtype, LEAF_BOUND)
        value = self._random.randint(-LEAF_BOUND, LEAF_BOUND)
        return Expression(tirx.const(value, dtype), dtype, LEAF_BOUND)

    def _condition(self, depth: int) -> Any:
        random = self._random
        dtype = random.choice(self._compared)
        a, b = self.draw(dtype, depth).node, self.draw(dtype, depth).node
        compare = random.choice(
            [
                lambda: a < b,
                lambda: a <= b,
                lambda: a > b,
                lambda: a >= b,
                lambda: a == b,
                lambda: a != b,
            ]
        )()
        kind = random.randrange(4)
        if kind == 0 and depth > 0:
            return tirx.all(compare, self._condition(depth - 1))
        if kind == 1 and depth > 0:
            return tirx.any(compare, self._condition(depth - 1))
        return tirx.Not(compare) if kind == 2 else compare

    # --------------------------------------------------------------- both kinds

    def _choose(self, dtype: str, depth: int) -> Expression:
        a, b = self.draw(dtype, depth), self.draw(dtype, depth)
        select = self._random.choice([tirx.Select, tirx.if_then_else])
        node = select(self._condition(depth), a.node, b.node)
        return Expression(node, dtype, max(a.bound, b.bound))

    def _extreme(self, dtype: str, depth: int) -> Expression:
        if dtype not in self._compared:
            return self._choose(dtype, depth)
        a, b = self.draw(dtype, depth), self.draw(dtype, depth)
        pick = self._random.choice([tirx.min, tirx.max])
        return Expression(pick(a.node, b.node), dtype, max(a.bound, b.bound))

    def _from_bool(self, dtype: str, depth: int) -> Expression:
        return Expression(tirx.Cast(dtype, self._condition(depth)), dtype, 1)

    # ----------------------------------------------------------------- integers

    def _integer_choices(self) -> list[Callable[[str, int], Expression]]:
        return [
            *[self._arithmetic] * 3,
            self._divided,
            self._bitwise,
            self._shifted,
            self._integer_cast,
            self._from_float,
            self._counted,
            self._choose,
            self._extreme,
            self._from_bool,
        ]

    def _arithmetic(self, dtype: str, depth: int) -> Expression:
        a, b = self.draw(dtype, depth), self.draw(dtype, depth)
        kind = self._random.randrange(3)
        if np.dtype(dtype).itemsize >= 4:
            limit = np.iinfo(dtype).max
            if kind == 1 and dtype.startswith("u"):  # at least 8 less at most 7
                top = tirx.bitwise_or(a.node, tirx.const(8, dtype))
                return Expression(top - self._small(b).node, dtype)
            needed = a.bound * b.bound if kind == 2 else a.bound + b.bound
            if needed > limit:
                a, b = self._small(a), self._small(b)
        node = (a.node + b.node, a.node - b.node, a.node * b.node)[kind]
        return Expression(node, dtype, a.bound * b.bound if kind == 2 else a.bound + b.bound)

    def _small(self, value: Expression) -> Expression:
        return Expression(tirx.bitwise_and(value.node, tirx.const(7, value.dtype)), value.dtype, 7)

    def _divided(self, dtype: str, depth: int) -> Expression:
        a = self.draw(dtype, depth).node
        # Clearing high bits and setting one makes a divisor of 1, 3, 5 or 7, negated at times.
        b = tirx.bitwise_or(
            tirx.bitwise_and(self.draw(dtype, depth).node, tirx.const(6, dtype)),
            tirx.const(1, dtype),
        )
        if not dtype.startswith("u") and self._random.random() < 0.5:
            b = -b - tirx.const(1, dtype)
        operation = self._random.choice(
            [tirx.truncdiv, tirx.truncmod, tirx.floordiv, tirx.floormod]
        )
        return Expression(operation(a, b), dtype)

    def _bitwise(self, dtype: str, depth: int) -> Expression:
        a, b = self.draw(dtype, depth).node, self.draw(dtype, depth).node
        operation = self._random.choice([tirx.bitwise_and, tirx.bitwise_or, tirx.bitwise_xor])
        node = operation(a, b)
        return Expression(tirx.bitwise_not(node) if self._random.random() < 0.3 else node, dtype)

    def _shifted(self, dtype: str, depth: int) -> Expression:
        width = np.dtype(dtype).itemsize * 8
        amount = tirx.bitwise_and(self.draw(dtype, depth).node, tirx.const(width - 1, dtype))
        operation = self._random.choice([tirx.shift_left, tirx.shift_right])
        return Expression(operation(self.draw(dtype, depth).node, amount), dtype)

    def _integer_cast(self, dtype: str, depth: int) -> Expression:
        source = self._random.choice(INTEGERS)
        node = self.draw(source, depth).node
        if (source, dtype) == ("uint32", "int64"):
            # On its way to GPUs TVM narrows this conversion to one over int32.
            node = tirx.bitwise_and(node, tirx.const(2**31 - 1, source))
        return Expression(tirx.Cast(dtype, node), dtype)

    def _from_float(self, dtype: str, depth: int) -> Expression:
        source = self.draw(self._random.choice(FLOATS), depth)
        limit = tirx.const(100, source.dtype)
        low = tirx.const(0, source.dtype) if dtype.startswith("u") else -limit
        return Expression(tirx.Cast(dtype, tirx.min(tirx.max(source.node, low), limit)), dtype)

    def _counted(self, dtype: str, depth: int) -> Expression:
        return Expression(tirx.popcount(self.draw(dtype, depth).node), dtype)

    # ------------------------------------------------------------------- floats

    def _float_choices(self) -> list[Callable[[str, int], Expression]]:
        return [
            *[self._exact] * 4,
            self._from_integer,
            self._float_cast,
            self._rounded,
            self._choose,
            self._extreme,
            self._from_bool,
        ]

    def _exact(self, dtype: str, depth: int) -> Expression:
        a, b = self.draw(dtype, depth), self.draw(dtype, depth)
        limit = LARGEST_EXACT[dtype]
        if a.bound * b.bound <= limit and self._random.random() < 0.5:
            return Expression(a.node * b.node, dtype, a.bound * b.bound)
        if a.bound + b.bound <= limit:
            node = a.node + b.node if self._random.random() < 0.5 else a.node - b.node
            return Expression(node, dtype, a.bound + b.bound)
        return self._extreme(dtype, depth)

    def _from_integer(self, dtype: str, depth: int) -> Expression:
        source = self._random.choice(INTEGERS)
        small = tirx.bitwise_and(self.draw(source, depth).node, tirx.const(15, source))
        return Expression(tirx.Cast(dtype, small), dtype, 15)

    def _float_cast(self, dtype: str, depth: int) -> Expression:
        (source,) = set(FLOATS) - {dtype}
        inner = self.draw(source, depth)
        limit = min(inner.bound, LARGEST_EXACT[dtype])
        bound = tirx.const(limit, source)
        clipped = tirx.min(tirx.max(inner.node, -bound), bound)
        return Expression(tirx.Cast(dtype, clipped), dtype, limit)

    def _rounded(self, dtype: str, depth: int) -> Expression:
        inner = self.draw(dtype, depth)
        half = inner.node * tirx.const(0.5, dtype)
        rounding = self._random.choice([tirx.floor, tirx.ceil, tirx.trunc, tirx.nearbyint])
        return Expression(rounding(half), dtype, max(1, inner.bound))


def random_inputs(seed: int, length: int) -> dict[str, np.ndarray]:
    """Return one input of each type."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for dtype in TYPES:
        if dtype in FLOATS:
            values = rng.integers(-LEAF_BOUND, LEAF_BOUND, length, endpoint=True)
        else:
            limits = np.iinfo(dtype)
            values = rng.integers(limits.min, limits.max, length, dtype, endpoint=True)
            values[: length // 4] = rng.integers(0, LEAF_BOUND, length // 4)
        inputs[dtype] = values.astype(dtype)
    return inputs
