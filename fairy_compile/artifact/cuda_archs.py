"""Which GPUs the machine code of a CUDA library runs on."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARCH = re.compile(r"sm_(\d+)(\d)([af]?)$")


def runs_on(archs: Sequence[str], capability: str) -> bool:
    """Tell whether code for some architectures runs on a GPU.

    Machine code runs on GPUs of the same major version and an equal or later minor one; that of a
    variant (``sm_90a``) on no other version. Libraries also hold PTX of the newest architecture
    that is no variant, which later GPUs translate (CUDA programming guide, "Application
    compatibility"; `compiler.cuda_binary` writes it).

    Args:
        archs: such as ``("sm_80", "sm_90a")``; names of another form run nowhere.
        capability: compute capability of the GPU, e.g. ``"8.9"``.
    """
    device = tuple(int(part) for part in capability.split("."))
    plain = []
    for arch in archs:
        match = _ARCH.match(arch)
        if not match:
            continue
        version = int(match[1]), int(match[2])
        if match[3]:
            if version == device:
                return True
            continue
        plain.append(version)
        if version[0] == device[0] and version[1] <= device[1]:
            return True
    return any(max(plain) <= device for _ in plain)
