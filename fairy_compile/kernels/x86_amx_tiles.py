"""AMX tile registers in TIR: asking for them, configuring, loading, multiplying, storing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import span, store
from fairy_compile.kernels.x86_amx_activations import BYTES, ROWS

if TYPE_CHECKING:
    from tvm.ir import Expr

TILES = 8
"""Tile registers."""

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux gives tiles to processes that ask.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def permitted() -> Expr:
    """Return whether the system lets this process use tiles, as a condition.

    Asking again costs a tenth of a microsecond and needs no state; where the system refuses (or
    the host is an older one), a kernel has to take another path.
    """
    request = (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    refused = T.call_extern("int64", "syscall", *(T.int64(v) for v in request))
    return T.bind(refused) == 0


def configure() -> None:
    """Load a configuration of palette 1 with eight full tiles; threads each need their own."""
    config = T.alloc_buffer((64,), "uint8")
    store(config, span(0, 64), T.broadcast(T.uint8(0), 64))
    store(config, 0, T.uint8(1))
    for tile in range(TILES):
        store(config, 16 + 2 * tile, T.uint8(BYTES))
        store(config, 48 + tile, T.uint8(ROWS))
    T.evaluate(_op("ldtilecfg", T.address_of(config[0])))


def release() -> None:
    """Give the tile registers back."""
    T.evaluate(_op("tilerelease"))


def zero(register: int) -> None:
    """Fill a tile with zeros."""
    T.evaluate(_op("tilezero", T.uint8(register)))


def load(register: int, address: Expr) -> None:
    """Load a tile whose rows follow one another in memory."""
    T.evaluate(_op("tileloadd64", T.uint8(register), address, T.int64(BYTES)))


def multiply(total: int, a: int, b: int) -> None:
    """Add the products of signed bytes of tiles ``a`` and ``b`` to the int32 tile ``total``."""
    T.evaluate(_op("tdpbssd", *(T.uint8(register) for register in (total, a, b))))


def save(register: int, address: Expr) -> None:
    """Store a tile's rows one after the other."""
    T.evaluate(_op("tilestored64", T.uint8(register), address, T.int64(BYTES)))


def _op(name: str, *args: Any) -> Expr:
    return T.call_llvm_intrin("void", f"llvm.x86.{name}", *args)
