"""Blocks of host memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fairy_compile.runtime.host_memory import ALIGNMENT, allocate, allocate_parts

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_flags(address: int) -> list[str]:
    """Return the kernel's flags of the mapping that holds ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and ":" not in first:
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return rest.split()
    raise LookupError(hex(address))


def test_parts_are_aligned_zeroed_and_apart() -> None:
    parts = allocate_parts([100, 0, 64, 1])
    assert [part.nbytes for part in parts] == [100, 0, 64, 1]
    assert all(part.ctypes.data % ALIGNMENT == 0 for part in parts)
    assert not any(part.any() for part in parts)
    for number, part in enumerate(parts):
        part[...] = number + 1
    assert [set(part.tolist()) for part in parts] == [{1}, set(), {3}, {4}]


def test_no_parts() -> None:
    assert allocate_parts([]) == []
    assert allocate(0).dtype == np.uint8


@pytest.mark.skipif(not THP.exists(), reason="this system has no transparent huge pages")
def test_huge_pages_are_asked_for() -> None:
    assert "hg" in mapping_flags(allocate(8 << 20).ctypes.data)
