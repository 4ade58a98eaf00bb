"""Knobs from schedule files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fairy_compile import FairyError
from fairy_compile.compiler import schedules
from fairy_compile.compiler.schedules import Schedules
from fairy_compile.kernels import FAMILIES
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import load_target, schedules_directory, tomllib
from fairy_compile.tune.records import Record, read_records, write_records
from fairy_compile.tune.versions import versions_text

GENERIC = FAMILIES["generic"][0]


def write(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str) -> None:
    directory.mkdir(exist_ok=True)
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
        for entry in tomllib.loads(file.read_text("utf-8")).get("knobs", []):
            schedules.knobs_for(kernels[entry["kernel"]], entry["batch"], [entry])
        for record in read_records(file):
            assert not schedules.unknown_knobs(kernels[record.kernel], record.values)


# ------------------------------------------------------------------ records

X86 = next(k for k in FAMILIES["x86.codebook"] if k.name.endswith("avx512vbmi"))


def make_record(task="4096x4096 T=2 UW tensor int8", **changes) -> Record:
    fields = {
        "kernel": X86.name,
        "batch": "many",
        "values": {"tokens": 2},
        "rows": (4,),
        "median_us": (1.0,),
        "default_us": (2.0,),
        "gain": 2.0,
        "spread": 0.0,
        "device": "one",
        "date": "2026-01-01",
        "versions": versions_text(),
    }
    return Record(task, **fields | changes)


def make_schedules(monkeypatch, directory: Path, *records: Record, head="") -> Schedules:
    write(monkeypatch, directory, head)
    if records:
        write_records(directory / "cpu.toml", records)
    return Schedules(replace(load_target("cpu"), detected=False))


def spec_of(out=4096, columns=4096, **changes) -> PhaseSpec:
    spec = PhaseSpec((out // 2,), columns // 2, 2, ("U", "W"), "tensor", "int8")
    return replace(spec, **changes)


HEAD = f'[[knobs]]\nkernel = "{X86.name}"\nbatch = "many"\nvalues = {{ columns = 512 }}\n'


def test_a_record_serves_its_call_and_near_ones(monkeypatch, tmp_path: Path) -> None:
    wide = make_record("16384x4096 T=2 UW tensor int8", values={"tokens": 1})
    schedules = make_schedules(monkeypatch, tmp_path, make_record(), wide, head=HEAD)

    def choose(spec, batch="many", demands=()):
        choice = schedules.choose(X86, spec, batch, dict(demands))
        return choice.values, choice.origin

    # A record is a whole setting: what it leaves out is the kernel's default, not [[knobs]].
    assert choose(spec_of()) == ({"tokens": 2}, "tuned")
    assert choose(spec_of(4096, 8192)) == ({"tokens": 2}, "near")
    assert choose(spec_of(16384, 8192)) == ({"tokens": 1}, "near")
    assert choose(spec_of(128, 128)) == ({"columns": 512}, "default")
    assert choose(spec_of(stages=1)) == ({"columns": 512}, "default")
    assert choose(spec_of(act="int16")) == ({"columns": 512}, "default")
    assert choose(spec_of(), "single") == ({}, "default")
    # What the weights demand has the last word.
    values, origin = choose(spec_of(), demands={"panels": "joint"}.items())
    assert (values, origin) == ({"tokens": 2, "panels": "joint"}, "near")
    assert schedules.notes == []


def test_records_of_other_demands_are_for_those(monkeypatch, tmp_path: Path) -> None:
    demanded = make_record(values={"tokens": 1}, demands={"panels": "joint"})
    schedules = make_schedules(monkeypatch, tmp_path, make_record(), demanded)
    choice = schedules.choose(X86, spec_of(), "many", {"panels": "joint"})
    assert (choice.values, choice.origin) == ({"tokens": 1, "panels": "joint"}, "tuned")
    assert schedules.choose(X86, spec_of(), "many", {}).values == {"tokens": 2}


def test_conflicts_age_and_unknown_knobs_are_told(monkeypatch, tmp_path: Path) -> None:
    later = make_record(values={"tokens": 1}, device="two", date="2026-02-01")
    schedules = make_schedules(monkeypatch, tmp_path, make_record(), later)
    assert schedules.choose(X86, spec_of(), "many", {}).values == {"tokens": 1}
    (note,) = schedules.notes
    assert "differ between one, two" in note
    assert "2026-02-01" in note
    old = make_record(versions="fairy-compile 0.0.1")
    schedules = make_schedules(monkeypatch, tmp_path / "old", old)
    assert schedules.choose(X86, spec_of(), "many", {}).values == {"tokens": 2}
    assert "fairy-compile 0.0.1" in schedules.notes[0]
    unknown = make_record(values={"tokens": 64})
    schedules = make_schedules(monkeypatch, tmp_path / "unknown", unknown)
    assert schedules.choose(X86, spec_of(), "many", {}).origin == "default"
    assert "knob tokens to 64" in schedules.notes[0]
    assert "tune again" in schedules.notes[0]
