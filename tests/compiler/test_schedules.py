"""Knobs from schedule files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile import FairyError
from fairy_compile.compiler import schedules
from fairy_compile.kernels import FAMILIES
from fairy_compile.targets import load_target, schedules_directory, tomllib

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


def test_the_cpu_of_this_machine_has_the_last_word(monkeypatch, tmp_path: Path) -> None:
    entry = '[[knobs]]\nkernel = "generic"\nbatch = "many"\nvalues = {{ rows_per_task = {} }}\n'
    write(monkeypatch, tmp_path, entry.format(32))
    (tmp_path / "tested.toml").write_text(entry.format(16))
    here = load_target("cpu")
    here = replace(here, tvm=here.tvm | {"mcpu": "tested"})
    assert schedules.knobs_for(GENERIC, "many", schedules.load_knobs(here)) == {"rows_per_task": 16}
    elsewhere = replace(here, detected=False)
    chosen = schedules.knobs_for(GENERIC, "many", schedules.load_knobs(elsewhere))
    assert chosen == {"rows_per_task": 32}


def test_shipped_files_name_known_kernels_and_knobs() -> None:
    kernels = {kernel.name: kernel for family in FAMILIES.values() for kernel in family}
    files = list(schedules_directory().glob("*.toml"))
    assert files
    for file in files:
        for entry in tomllib.loads(file.read_text("utf-8"))["knobs"]:
            schedules.knobs_for(kernels[entry["kernel"]], entry["batch"], [entry])
