"""Where libraries are linked."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from fairy_compile.compiler.export import export_library
from fairy_compile.targets import load_target


class Executable:
    """Exports nothing; tells where objects would lie."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.workspace = error, Path()

    def export_library(self, path: str, workspace_dir: str, **_: object) -> None:
        self.workspace = Path(workspace_dir)
        assert list(self.workspace.iterdir()) == []
        (self.workspace / "lib0.o").write_bytes(b"object")
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("linker")])
def test_objects_lie_beside_the_library_and_are_removed(tmp_path: Path, error) -> None:
    """There is room for them; LLVM ends the process where there is none."""
    (tmp_path / ".objects").mkdir()
    (tmp_path / ".objects" / "killed.o").touch()
    executable = Executable(error)
    with suppress(RuntimeError):
        export_library(executable, load_target("cpu"), tmp_path)
    assert executable.workspace.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
