"""A run that is killed leaves no process, and goes on with at most one trial lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fairy_compile.tune.records import read_records
from fairy_compile.tune.trials import Journal
from tests.tune.test_workers import alive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc"),
]


def start(place: Path, temporary: Path) -> subprocess.Popen:
    environment = dict(os.environ, TMPDIR=str(temporary))
    command = [sys.executable, "-m", "tests.tune.killable", str(place)]
    return subprocess.Popen(command, env=environment)


def lines(place: Path) -> int:
    path = place / "trials.jsonl"
    return path.read_bytes().count(b'{"trial"') if path.exists() else 0


def test_kill_and_go_on(tmp_path):
    temporary, tmp_path = tmp_path / "temporary", tmp_path / "run"
    temporary.mkdir()
    run = start(tmp_path, temporary)
    limit = time.monotonic() + 300
    while lines(tmp_path) < 3:
        assert run.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    run.kill()
    run.wait()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    limit = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < limit
        time.sleep(0.1)
    before = Journal(tmp_path / "trials.jsonl", {}, read_only=True)
    kept = {tuple(t.knobs.values()) for t in before.trials}
    assert len(before.trials) >= 3
    assert start(tmp_path, temporary).wait(600) == 0
    after = Journal(tmp_path / "trials.jsonl", {}, read_only=True)
    # What was noted is not measured again: no settings stand in the journal twice.
    assert after.trials[: len(before.trials)] == before.trials
    assert len({(t.task, *t.knobs.values()) for t in after.trials}) == len(after.trials)
    assert kept <= {tuple(t.knobs.values()) for t in after.trials}
    assert sum(t.counts for t in after.trials) <= 8
    assert len(after.finished) == 2
    assert len(read_records(tmp_path / "cpu.toml")) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"trials.jsonl", "cpu.toml", "pids"}
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert not any(map(alive, pids))
    assert list(temporary.iterdir()) == []
