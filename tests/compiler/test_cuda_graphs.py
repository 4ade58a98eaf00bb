"""Which builds record decode steps, and what they are told."""

from __future__ import annotations

import pytest

import fairy_compile as fc
from fairy_compile.compiler.cuda_graphs import plan_graphs
from fairy_compile.targets import load_target


def test_a_build_asks_or_the_target_does() -> None:
    cuda, notes = load_target("cuda"), []
    assert plan_graphs(cuda, True, 8, True, notes) == 8
    assert "up to 8" in notes[0]
    assert plan_graphs(cuda, False, 8, True, notes) is None
    wanted = 8 if cuda.extra.get("cuda_graphs") else None
    assert plan_graphs(cuda, None, 8, True, notes) == wanted
    assert plan_graphs(load_target("metal"), None, 8, True, []) is None


def test_other_devices_have_none() -> None:
    with pytest.raises(fc.FairyError, match="runs on metal; allowed for cuda only"):
        plan_graphs(load_target("metal"), True, 8, True, [])
