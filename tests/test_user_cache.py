"""Where the user's cache is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fairy_compile.artifact import check_output
from fairy_compile.bench.gguf_model import default_cache
from fairy_compile.errors import FairyError
from fairy_compile.tvm_pair import check_tvm_pair
from fairy_compile.user_cache import cache_directory


def test_the_variable_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAIRY_COMPILE_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    assert default_cache() == tmp_path / "peers"


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


@pytest.mark.skipif(sys.platform == "win32", reason="asks for users by number")
def test_users_without_a_home_directory_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """As those of containers are, which have a number and no name."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "FAIRY_COMPILE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for call in (cache_directory, default_cache, check_tvm_pair):
        with pytest.raises(FairyError, match="no home directory, and HOME is not set; set it to"):
            call()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fairy.json").touch()
    check_output(tmp_path / "out", force=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check_tvm_pair()
    assert cache_directory() == tmp_path / "fairy_compile"
