"""Host memory for what kernels stream: one block, on huge pages where the system has them.

Decoding streams all weights once per token, so on 4 KiB pages address translation costs several
per cent. The measured floor (`bench.bandwidth`) and the kernel benchmarks take their memory from
here too, so that all sides of a comparison pay the same.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence

import numpy as np

# Compiled functions may use aligned loads of a whole cache line.
ALIGNMENT = 64


def allocate(nbytes: int) -> np.ndarray:
    """Return zeroed bytes on a page boundary, on transparent huge pages if the system gives them.

    Returns:
        uint8, at least ``nbytes`` long.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)
    # Private, because shared anonymous memory gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(nbytes, 1), flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def allocate_parts(sizes: Sequence[int]) -> list[np.ndarray]:
    """Return one block as aligned parts of the given sizes in bytes."""
    aligned = (-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    starts = list(itertools.accumulate(aligned, initial=0))
    block = allocate(starts[-1])
    return [block[at : at + size] for at, size in zip(starts, sizes, strict=False)]
