from __future__ import annotations

import hashlib

import pytest

from fairy_compile.artifact import FileEntry, describe_files, human_bytes
from fairy_compile.artifact.files import path_problem, resolve_inside


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3_249_000_000, "3.2 GB"), (10**13, "10.0 TB")],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_entries_hash_only_what_is_not_known(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"22")
    known = {"b": FileEntry(2, "known")}
    assert describe_files(tmp_path, ["b", "a"], known) == {
        "a": FileEntry(1, hashlib.sha256(b"1").hexdigest()),
        "b": known["b"],
    }


def test_files_in_folders_are_allowed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").touch()
    assert path_problem("sub/a") is None
    assert resolve_inside(tmp_path, "sub/a", "test").name == "a"


@pytest.mark.parametrize("name", ["a//b", "a/", "a/./b", "a/../b", "/a", "a\nb", "NUL:"])
def test_path_problems(name):
    assert path_problem(name)
