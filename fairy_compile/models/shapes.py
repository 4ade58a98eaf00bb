"""Shapes with symbolic dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx


def product(dims: Sequence[Any]) -> Any:
    """Multiply static and symbolic dimensions, dropping static ones."""
    static, symbolic = 1, []
    for dim in dims:
        if isinstance(dim, (int, tirx.IntImm)):
            static *= int(dim)
        else:
            symbolic.append(dim)
    product: Any = static
    for dim in symbolic:
        product = dim if isinstance(product, int) and product == 1 else product * dim
    return product
