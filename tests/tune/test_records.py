"""Records: text there and back, merging, files, and messages."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.targets import tomllib
from fairy_compile.tune.records import MARK, Record, merge, read_records, write_records

RECORD = Record(
    task="8192x4096 T=2 UW tensor int8",
    kernel="x86.codebook.avx2",
    batch="many",
    values={"tokens": 2, "tables": "split"},
    rows=(4, 128),
    median_us=(812.5, 20000.0),
    default_us=(1000.0, 20010.0),
    gain=1.11,
    spread=0.0123,
    device='A "quoted" CPU\\n, 2 threads',
    date="2026-11-26",
    versions="fairy-compile 0.1.0, apache-tvm 0.27.0.post1",
)


def test_text_is_toml_and_comes_back():
    for record in (RECORD, replace(RECORD, values={}, demands={"panels": "joint"})):
        (table,) = tomllib.loads(record.to_text())["tuned"]
        assert Record.from_table(table, "here") == record


def test_merging_does_not_depend_on_order():
    records = [
        RECORD,
        replace(RECORD, date="2026-12-01", gain=1.0),
        replace(RECORD, device="another"),
        replace(RECORD, batch="single", rows=(1,), median_us=(1.0,), default_us=(2.0,)),
        replace(RECORD, gain=1.2, values={"tokens": 1}),
    ]
    results = {
        tuple(r.to_text() for r in merge(order)) for order in itertools.permutations(records)
    }
    assert len(results) == 1
    merged = merge(records)
    assert len(merged) == 3
    assert [r.date for r in merged if r.batch == "many" and r.device == RECORD.device] == [
        "2026-12-01"
    ]


def test_a_file_keeps_what_stands_above(tmp_path):
    path = tmp_path / "cpu.toml"
    head = '# Why: measured.\n\n[[knobs]]\nkernel = "a"\nbatch = "many"\nvalues = {}\n'
    path.write_text(head)
    write_records(path, [RECORD])
    first = path.read_text()
    assert first.startswith(head)
    assert first.count(MARK) == 1
    other = replace(RECORD, task="4096x4096 T=2 UW tensor int8")
    write_records(path, [other])
    both = path.read_text()
    assert both.startswith(head)
    assert [r.task for r in read_records(path)] == [other.task, RECORD.task]
    write_records(path, [RECORD, other])
    assert path.read_text() == both
    # Of one day the later run counts, even if it found less.
    write_records(path, [replace(RECORD, gain=1.0)])
    assert [r.gain for r in read_records(path)] == [RECORD.gain, 1.0]
    write_records(path, [replace(RECORD, gain=1.3, date="2025-01-01"), RECORD])
    assert list(tmp_path.iterdir()) == [path]


def test_two_peoples_files_merge_to_one(tmp_path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    mine = [RECORD, replace(RECORD, task="4096x4096 T=2 UW tensor int8")]
    theirs = [replace(RECORD, date="2026-12-01"), replace(RECORD, device="theirs")]
    write_records(a, mine)
    write_records(a, theirs)
    write_records(b, theirs)
    write_records(b, mine)
    assert a.read_text() == b.read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "big"}, "task is 'big'"),
        ({"task": f"{10**12}x4 T=2 UW tensor int8"}, "out of range"),
        ({"rows": [1]}, "differ in length"),
        ({"gain": "much"}, "gain is 'much'"),
        ({"gain": float("nan")}, "gain is nan"),
        ({"values": {"a b": 1}}, "values is"),
        ({"values": {"a": [1]}}, "values is"),
        ({"device": 7}, "device is 7"),
    ],
)
def test_bad_records_are_explained(change, words):
    (table,) = tomllib.loads(RECORD.to_text())["tuned"]
    with pytest.raises(FairyError, match=words):
        Record.from_table(table | change, "here")
    with pytest.raises(FairyError, match="kernel is missing"):
        Record.from_table({k: v for k, v in table.items() if k != "kernel"}, "here")


def test_marks_of_a_conflict_are_explained(tmp_path):
    path = tmp_path / "cpu.toml"
    path.write_text(f"<<<<<<< mine\n{RECORD.to_text()}\n=======\n>>>>>>> theirs\n")
    with pytest.raises(FairyError, match="merge conflict"):
        read_records(path)
    path.write_text(RECORD.to_text())
    with pytest.raises(FairyError, match="not the line above"):
        write_records(path, [RECORD])
