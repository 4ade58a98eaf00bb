"""The journal: what is written comes back, and other runs' files are refused."""

from __future__ import annotations

import os

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.tune.trials import Journal, Trial

ONE = Trial("t", {"a": 1}, "ok", 0.5, (1.0,), (2.0,), (0.5,), (0.01,), "here", "", ("d",), 3.0)
TWO = Trial("t", {"a": 2}, "crash", 4.0, reason="SIGILL", at=4.0)


def test_trials_come_back(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {"seed": 0})
    assert not journal.resumed
    journal.add(ONE)
    journal.add(TWO)
    journal.note_bandwidth(1e10)
    journal.finish("t", {"x": 1}, 5.0)
    journal.close()
    again = Journal(path, {"seed": 0})
    assert again.trials == [ONE, TWO]
    assert (again.finished, again.seconds) == ({"t": {"x": 1}}, 5.0)
    assert again.read_bytes_per_second == 1e10
    again.drop("here", "it lies", void=True)
    assert again.trials == [TWO]
    again.close()
    third = Journal(path, {"seed": 0})
    assert third.trials == [TWO]
    assert third.dropped == {"here": "it lies"}


def test_every_cut_of_the_file_is_a_beginning(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {})
    journal.add(ONE)
    journal.add(TWO)
    journal.close()
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        cut = Journal(path, {})
        assert cut.trials == [ONE, TWO][: max(0, data[:length].count(b"\n") - 1)]
        cut.add(TWO)
        cut.close()
        assert Journal(path, {}).trials[-1] == TWO


def test_other_runs_and_damage_are_explained(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {"seed": 0, "target": "cpu"})
    journal.add(ONE)
    with pytest.raises(FairyError, match="in use"):
        Journal(path, {"seed": 0, "target": "cpu"})
    Journal(path, {"seed": 0, "target": "cpu"}, read_only=True)
    journal.close()
    with pytest.raises(FairyError, match=r"other target: cpu.*--force"):
        Journal(path, {"seed": 0, "target": "rpi5"})
    for bad in (b"nonsense\n", b'{"trial":{"task":"t"}}\n', b'{"x":1}\n', b"[]\n",
                b'{"trial":{"task":"t","knobs":{},"status":"odd","score":1}}\n'):  # fmt: skip
        other = tmp_path / f"{os.urandom(4).hex()}.jsonl"
        other.write_bytes(path.read_bytes() + bad)
        with pytest.raises(FairyError, match="line 3 is damaged"):
            Journal(other, {"seed": 0, "target": "cpu"})
