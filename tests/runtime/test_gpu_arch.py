"""A CUDA artifact on a GPU that it has no machine code for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fairy_compile.artifact.manifest import TargetInfo
from fairy_compile.errors import UnsupportedError
from fairy_compile.runtime import machine


@pytest.fixture
def gpu(monkeypatch):
    device = SimpleNamespace(type="cuda", compute_version="8.9", device_name="RTX 4090")
    monkeypatch.setattr(machine, "open_device", lambda name: device)
    return device


def manifest(*archs: str) -> SimpleNamespace:
    return SimpleNamespace(target=TargetInfo("cuda-hopper", "cuda", "", (), archs))


def test_it_is_refused_with_what_helps(gpu):
    words = r"sm_90a; this GPU \(RTX 4090\) has compute capability 8\.9; .* --target cuda,"
    with pytest.raises(UnsupportedError, match=words):
        machine.check_arch(manifest("sm_90a"), None)


def test_code_for_it_is_taken(gpu):
    machine.check_arch(manifest("sm_80", "sm_90a"), None)


def test_artifacts_that_name_none_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(machine, "open_device", None)
    machine.check_arch(manifest(), None)
