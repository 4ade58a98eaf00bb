"""Data types as SPIR-V sees them: a kind, a width, and lanes."""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import tvm

MAX_LANES = 4
"""Most components of a SPIR-V vector in Vulkan; wider values are kept in parts."""


class Kind(Enum):
    """What the bits of a scalar mean."""

    BOOL = "bool"
    INT = "int"
    UINT = "uint"
    FLOAT = "float"


class DType(NamedTuple):
    """A scalar type or a vector of one.

    Attributes:
        kind: what the bits mean.
        bits: width of a lane; 1 for booleans.
        lanes: number of lanes, 1 for scalars; may exceed `MAX_LANES`.
    """

    kind: Kind
    bits: int
    lanes: int = 1

    def __str__(self) -> str:
        name = "bool" if self.kind is Kind.BOOL else f"{self.kind.value}{self.bits}"
        return name if self.lanes == 1 else f"{name}x{self.lanes}"

    def with_lanes(self, lanes: int) -> DType:
        """Return this type with another number of lanes."""
        return self if lanes == self.lanes else DType(self.kind, self.bits, lanes)

    def with_kind(self, kind: Kind) -> DType:
        """Return the type of equal width and lanes whose bits mean ``kind``."""
        return DType(kind, self.bits, self.lanes)

    def with_bits(self, bits: int) -> DType:
        """Return this type with another width of a lane."""
        return DType(self.kind, bits, self.lanes)

    @property
    def scalar(self) -> DType:
        """The type of one lane."""
        return self.with_lanes(1)

    @property
    def is_integer(self) -> bool:
        """Whether lanes are signed or unsigned integers."""
        return self.kind in (Kind.INT, Kind.UINT)

    @property
    def lane_bytes(self) -> int:
        """Bytes of a lane in memory; a boolean takes one."""
        return max(1, self.bits // 8)

    def parts(self) -> tuple[DType, ...]:
        """Return the SPIR-V types a value of this type is kept in: vectors of up to four lanes."""
        return _parts(self)


BOOL = DType(Kind.BOOL, 1)
INT32 = DType(Kind.INT, 32)
UINT8 = DType(Kind.UINT, 8)
UINT32 = DType(Kind.UINT, 32)
FLOAT32 = DType(Kind.FLOAT, 32)

_KINDS = {"int": Kind.INT, "uint": Kind.UINT, "float": Kind.FLOAT, "bool": Kind.BOOL}
_WIDTHS = {
    Kind.INT: (8, 16, 32, 64),
    Kind.UINT: (8, 16, 32, 64),
    Kind.FLOAT: (16, 32, 64),
    Kind.BOOL: (1,),
}


@cache
def _parts(dtype: DType) -> tuple[DType, ...]:
    whole, rest = divmod(dtype.lanes, MAX_LANES)
    widths = [MAX_LANES] * whole + ([rest] if rest else [])
    return tuple(dtype.with_lanes(lanes) for lanes in widths)


def dtype_of(expr: Any) -> DType:
    """Return the type of a TIR expression.

    Raises:
        ValueError: SPIR-V has no such type.
    """
    return parse_dtype(str(expr.ty.dtype))


@cache
def parse_dtype(text: str) -> DType:
    """Return the type that TVM writes as ``text``, e.g. ``float16x4``.

    Raises:
        ValueError: SPIR-V has no such type.
    """
    name, _, lanes = text.partition("x")
    word = name.rstrip("0123456789")
    kind = _KINDS.get(word)
    bits = int(name[len(word) :] or 1)
    if kind is Kind.UINT and bits == 1:
        kind = Kind.BOOL
    if kind is None or bits not in _WIDTHS[kind] or (lanes and not lanes.isdigit()):
        raise ValueError(f"SPIR-V has no type {text}")
    return DType(kind, bits, int(lanes or 1))


def is_pointer(param: Any) -> bool:
    """Tell whether a kernel parameter is a buffer rather than a scalar."""
    return isinstance(param.ty, tvm.ir.PointerType)
