"""AMX tile registers in TIR: asking for them, configuring, multiplying.

A *tile* is 16 rows of 64 bytes. TDPBSSD adds to C, int32 (16 rows of x, 16 weight rows), the
product of A, int8 (16 rows of x, 64 columns), and B, the 64 columns of 16 weight rows:

    B[k][4 * row + j] = weight[row][4 * k + j]

which is the order that 16 vectors of `X86Layout` codes have, so decoding is one pass over bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import span, store
from fairy_compile.kernels.x86_amx_activations import BYTES, ROWS

if TYPE_CHECKING:
    from tvm.ir import Expr

_TILES = 8  # registers
_A, _B = 4, 6  # first registers of a kind

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
    for tile in range(_TILES):
        store(config, 16 + 2 * tile, T.uint8(BYTES))
        store(config, 48 + tile, T.uint8(ROWS))
    T.evaluate(_op("ldtilecfg", T.address_of(config[0])))


def release() -> None:
    """Give the tile registers back."""
    T.evaluate(_op("tilerelease"))


def sum_products(
    column_tiles: int,
    products: Sequence[tuple[int, int]],
    activations: Callable[[int, int], Expr],
    weights: Callable[[int, int], Expr],
    targets: Sequence[Expr],
) -> None:
    """Emit up to four sums over columns at once: registers 0-3 are C, 4-5 A and 6-7 B.

    One tile of rows of x at a time: two, which would load B half as often, measured 1.4 times as
    slow at 512 rows and 1.6 times at 32, as more of what is at work has to share L1.

    Args:
        column_tiles: tiles of 64 columns to sum.
        products: half of x and number of the weights of each sum.
        activations: (tile of columns, half of x) -> address of an A tile.
        weights: (tile of columns, number) -> address of a B tile.
        targets: addresses of the sums, int32 (16, 16).
    """
    for c in range(len(products)):
        T.evaluate(_op("tilezero", T.uint8(c)))
    for k in range(column_tiles):
        for half in sorted({half for half, _ in products}):
            _load(_A + half, activations(k, half))
        register, last = _B, None
        for c, (half, number) in enumerate(products):
            if number != last:
                register = _B + (register == _B)  # the other one of two
                _load(register, weights(k, number))
                last = number
            T.evaluate(_op("tdpbssd", *(T.uint8(r) for r in (c, _A + half, register))))
    for c, target in enumerate(targets):
        T.evaluate(_op("tilestored64", T.uint8(c), target, T.int64(BYTES)))


def _load(register: int, address: Expr) -> None:
    """Load a tile whose rows follow one another in memory."""
    T.evaluate(_op("tileloadd64", T.uint8(register), address, T.int64(BYTES)))


def _op(name: str, *args: Any) -> Expr:
    return T.call_llvm_intrin("void", f"llvm.x86.{name}", *args)
