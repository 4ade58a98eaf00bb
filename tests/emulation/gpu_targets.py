"""GPU targets with this machine as their host, for simulated devices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fairy_compile import targets

_HOST = '[tvm.host]\nkind = "llvm"\n'


def use_linux_host(monkeypatch: pytest.MonkeyPatch, directory: Path, *names: str) -> None:
    """Let target files ``names`` make libraries for this machine; others are not known."""
    files = [(name, targets.targets_directory() / f"{name}.toml") for name in names]
    directory.mkdir(exist_ok=True)
    for name, file in files:
        text = re.sub(r"^(library|linkers) = .*\n", "", file.read_text("utf-8"), flags=re.M)
        (directory / f"{name}.toml").write_text(text[: text.index("[tvm.host]")] + _HOST)
    monkeypatch.setattr(targets, "targets_directory", lambda: directory)
