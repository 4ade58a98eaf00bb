"""AMX tiles: Linux gives them only to processes that ask."""

from __future__ import annotations

import ctypes
import os
import platform

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), see Documentation/arch/x86/xstate.rst
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def request_amx() -> str | None:
    """Ask for AMX tiles for this process and all its threads.

    Kernels ask themselves where nobody did, and take another path where they are refused.

    Returns:
        None, or why there are none, in words: prefill is several times slower then.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "there is no AMX here: prefill runs on AVX-512, several times slower"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return None
    return (
        f"the system refuses AMX tiles ({os.strerror(ctypes.get_errno())}): prefill runs on "
        "AVX-512, several times slower"
    )
