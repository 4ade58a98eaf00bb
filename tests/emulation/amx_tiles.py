"""AMX tiles for machines that have none: `amx_tiles.c` in place of the tile instructions."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tvm.tirx.script import builder as T

if TYPE_CHECKING:
    from tvm.ir import Expr

_SOURCE = Path(__file__).with_name("amx_tiles.c")
_TILE_INSTRUCTIONS = ("llvm.x86.tile", "llvm.x86.ldtilecfg", "llvm.x86.tdp")
_genuine_intrinsic, _genuine_extern = T.call_llvm_intrin, T.call_extern


def compiler() -> str | None:
    """Return the C compiler that builds the emulation, or None."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """Build and open the emulation; its functions can be called by generated code then."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "amx_tiles.so"
        command = [str(compiler()), "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(path)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def tile_products() -> int:
    """Return how many products of tiles there were since the last call."""
    count = library().emulated_tile_products
    count.restype = ctypes.c_int64
    return int(count())


def emulate_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let functions that are built from now on use emulated tiles, which nobody refuses them."""
    library()
    monkeypatch.setattr(T, "call_llvm_intrin", _intrinsic)
    monkeypatch.setattr(T, "call_extern", _extern)


def _intrinsic(dtype: str, name: str, *args: Any) -> Expr:
    if name.startswith(_TILE_INSTRUCTIONS):
        return _genuine_extern(dtype, name.replace("llvm.x86.", "emulated_"), *args)
    return _genuine_intrinsic(dtype, name, *args)


def _extern(dtype: str, name: str, *args: Any) -> Expr:
    # The kernel asks Linux for tiles; 0 is yes.
    return T.int64(0) if name == "syscall" else _genuine_extern(dtype, name, *args)
