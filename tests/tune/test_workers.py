"""Worker processes: crashes, hangs, restarts, and none that is left behind."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.tune.workers import Worker, wait
from tests.tune import handlers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@contextmanager
def worker(tmp_path, *arguments):
    made = Worker("worker", handlers.make, arguments, tmp_path)
    try:
        yield made
    finally:
        made.close()


def ask(worker, request, timeout=60.0):
    worker.submit(request, timeout)
    while (reply := worker.poll()) is None:
        wait([worker], 5)
    return reply


def test_requests_are_answered(tmp_path):
    with worker(tmp_path) as w:
        assert ask(w, ("double", 21)).value == 42
        reply = ask(w, ("raise", "first\nsecond"))
        assert (reply.status, reply.value) == ("error", "ValueError: second")
        assert ask(w, ("refuse", "not so")).status == "refused"
        assert w.idle


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_costs_its_request_alone(tmp_path, number):
    with worker(tmp_path) as w:
        reply = ask(w, ("signal", number))
        assert reply.status == "crash"
        assert signal.Signals(number).name in reply.value
        assert "about to end" in reply.value
        assert ask(w, ("double", 1)).value == 2


def test_a_hang_ends_at_the_timeout(tmp_path):
    with worker(tmp_path) as w:
        assert ask(w, ("double", 1)).value == 2
        reply = ask(w, ("hang", str(tmp_path / "pid")), 1.5)
        assert reply.status == "timeout"
        assert "1.5 s" in reply.value
        assert not alive(int((tmp_path / "pid").read_text()))
        assert ask(w, ("double", 2)).value == 4


def test_one_that_died_idle_is_replaced(tmp_path):
    with worker(tmp_path) as w:
        first = ask(w, ("pid", None)).value
        os.kill(first, signal.SIGKILL)
        while alive(first):
            w.poll()
            time.sleep(0.02)
        assert ask(w, ("pid", None)).value != first


def test_one_that_cannot_start_is_told(tmp_path):
    with worker(tmp_path, "unfit") as w, pytest.raises(FairyError, match="no such CPU"):
        ask(w, ("double", 1))
    with (
        worker(tmp_path, "dead") as w,
        pytest.raises(FairyError, match=r"does not start.*status 3"),
    ):
        ask(w, ("double", 1))


def test_close_leaves_no_process(tmp_path):
    with worker(tmp_path) as w:
        pid = ask(w, ("pid", None)).value
    assert not alive(pid)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc")
def test_no_worker_outlives_a_killed_parent(tmp_path):
    parent = handlers.spawn_parent(tmp_path)
    note, limit = tmp_path / "pid", time.monotonic() + 120
    while not note.exists() or not note.read_text():
        assert time.monotonic() < limit
        assert parent.poll() is None
        time.sleep(0.1)
    orphan = int(note.read_text())
    assert alive(orphan)
    parent.kill()
    parent.wait()
    limit = time.monotonic() + 20
    while alive(orphan):
        assert time.monotonic() < limit
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
