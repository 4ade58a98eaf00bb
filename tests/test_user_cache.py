"""Where the user's cache is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fairy_compile.user_cache import cache_directory


def test_the_variable_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAIRY_COMPILE_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path


@pytest.mark.parametrize(
    ("platform", "variable", "end"),
    [
        ("linux", "XDG_CACHE_HOME", "fairy_compile"),
        ("win32", "LOCALAPPDATA", "fairy_compile"),
        ("darwin", "", "Library/Caches/fairy_compile"),
    ],
)
def test_platforms_have_their_own_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, end: str
) -> None:
    monkeypatch.delenv("FAIRY_COMPILE_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(tmp_path))
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    assert cache_directory() == tmp_path / end
