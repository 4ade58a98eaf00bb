"""x86 instructions that this machine lacks, as expressions of what AVX2 has.

The x86 kernels name machine instructions: byte shuffles and dot products. For an instruction set
that the machine lacks, the emulated ones take their place while TVM builds the function; all else,
the layout, loops, scales and outputs, is the code that ships. LLVM splits the wide vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86 import Isa

if TYPE_CHECKING:
    from tvm.ir import Expr

_LANE = 16
_genuine = T.call_llvm_pure_intrin


def without_hardware(isa: Isa) -> Isa:
    """Return ``isa`` under another name, for functions that are built with `emulate`."""
    return replace(isa, name=f"emulated_{isa.name}")


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let functions that are built from now on use emulated instructions."""
    monkeypatch.setattr(T, "call_llvm_pure_intrin", _call)


def _call(dtype: str, name: str, *args: Any) -> Expr:
    for known, emulated in _EMULATED.items():
        if name.startswith(known):
            return emulated(*args)
    return _genuine(dtype, name, *args)


def _dot(total: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """vpdpbusd: add to each int32 the dot product of four unsigned and four signed bytes."""
    lanes = _lanes(total)
    wide = f"int32x{4 * lanes}"
    left = T.cast(T.reinterpret(f"uint8x{4 * lanes}", unsigned), wide)
    products = T.bind(left * T.cast(signed, wide))
    for i in range(4):
        total = total + T.Shuffle([products], list(range(i, 4 * lanes, 4)))
    return total


def _pshufb(table: Expr, index: Expr) -> Expr:
    """vpshufb of 64 bytes: shuffles within lanes of 16, so halves are independent."""
    table, index = T.bind(table), T.bind(index)
    halves = [
        T.bind(_pshufb_avx2(*(T.Shuffle([v], list(range(i, i + 32))) for v in (table, index))))
        for i in (0, 32)
    ]
    return T.Shuffle(halves, list(range(64)))


def _pshufb_avx2(table: Expr, index: Expr) -> Expr:
    return _genuine("int8x32", "llvm.x86.avx2.pshuf.b", table, index)


def _vpermb(table: Expr, index: Expr) -> Expr:
    """vpermb: bytes of all 64, by the low six bits of the index."""
    table, index = T.bind(table), T.bind(index)
    halves = []
    for first in (0, 32):
        own = T.bind(T.Shuffle([index], list(range(first, first + 32))))
        byte = T.bind(T.bitwise_and(own, T.broadcast(T.int8(_LANE - 1), 32)))
        lane = T.bind(T.bitwise_and(own, T.broadcast(T.int8(64 - _LANE), 32)))
        found: Expr = T.broadcast(T.int8(0), 32)
        for start in range(0, 64, _LANE):
            of_lane = T.Shuffle([table], [start + i % _LANE for i in range(32)])
            hit = lane == T.broadcast(T.int8(start), 32)
            found = T.Select(hit, _pshufb_avx2(of_lane, byte), found)
        halves.append(T.bind(found))
    return T.Shuffle(halves, list(range(64)))


def _lanes(vector: Expr) -> int:
    text = str(getattr(vector, "dtype", None) or vector.ty.dtype)
    return int(text.split("x")[1])


_EMULATED = {
    "llvm.x86.avx512.vpdpbusd": _dot,
    "llvm.x86.avx512.pshuf.b.512": _pshufb,
    "llvm.x86.avx512.permvar.qi.512": _vpermb,
}
