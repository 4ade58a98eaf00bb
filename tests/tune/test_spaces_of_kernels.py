"""Every kernel's knobs make a space that a search takes."""

from __future__ import annotations

import math

import pytest

from fairy_compile.kernels import FAMILIES
from fairy_compile.tune.space import MAX_POINTS

KERNELS = {kernel.name: kernel for family in FAMILIES.values() for kernel in family}


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_small_enough(name: str) -> None:
    assert math.prod(len(values) for values in KERNELS[name].knobs.values()) <= MAX_POINTS
