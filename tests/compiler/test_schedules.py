"""Knobs from schedule files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairy_compile import FairyError
from fairy_compile.compiler import schedules
from fairy_compile.kernels import FAMILIES
from fairy_compile.targets import load_target, target_names

GENERIC = FAMILIES["generic"][0]


def write(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str) -> None:
    (directory / "cpu.toml").write_text(text)
    monkeypatch.setattr(schedules, "schedules_directory", lambda: directory)


def test_knobs_of_the_named_kernel_and_batch(monkeypatch, tmp_path: Path) -> None:
    text = '[[knobs]]\nkernel = "generic"\nbatch = "many"\nvalues = { rows_per_task = 32 }\n'
    write(monkeypatch, tmp_path, text)
    entries = schedules.load_knobs(load_target("cpu"))
    assert schedules.knobs_for(GENERIC, "many", entries) == {"rows_per_task": 32}
    assert schedules.knobs_for(GENERIC, "single", entries) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[knobs", "malformed"),
        ('[[knobs]]\nkernel = "generic"\n', "expected kernel, batch and values"),
        (
            '[[knobs]]\nkernel = "generic"\nbatch = "many"\nvalues = { rows_per_task = 5 }\n',
            "rows_per_task",
        ),
        ('[[knobs]]\nkernel = "generic"\nbatch = "many"\nvalues = { tile = 5 }\n', "tile"),
    ],
)
def test_bad_files_are_explained(monkeypatch, tmp_path: Path, text: str, words: str) -> None:
    write(monkeypatch, tmp_path, text)
    with pytest.raises(FairyError, match=words):
        schedules.knobs_for(GENERIC, "many", schedules.load_knobs(load_target("cpu")))


def test_shipped_files_name_known_kernels_and_knobs() -> None:
    kernels = {kernel.name: kernel for family in FAMILIES.values() for kernel in family}
    for name in target_names():
        for entry in schedules.load_knobs(load_target(name)):
            schedules.knobs_for(kernels[entry["kernel"]], entry["batch"], [entry])
