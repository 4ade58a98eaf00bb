"""Tuning over TVM RPC: several devices at once, one that dies and one that lies."""

from __future__ import annotations

import socket
import threading

import pytest

from fairy_compile.errors import FairyError
from fairy_compile.kernels import FAMILIES
from fairy_compile.op import PhaseSpec
from fairy_compile.tune.builder import SYMBOL, Builder
from fairy_compile.tune.crew import rpc_crew
from fairy_compile.tune.measure import Effort
from fairy_compile.tune.records import read_records
from fairy_compile.tune.rpc import count_devices
from fairy_compile.tune.run import Run
from fairy_compile.tune.settings import Settings, parse_address
from fairy_compile.tune.tasks import Task, collect
from fairy_compile.tune.trials import Journal
from tests.tune.rpc_rig import missing, rig, target_of

pytest.importorskip("tornado", reason="the tracker needs tornado")

SPECS = [PhaseSpec((n,), 128, 2, ("U", "W"), "tensor", "int8") for n in (64, 32)]


def make_tasks(target) -> list[Task]:
    """The decode calls of a tiny model."""
    kernels = [k for name in target.kernels for k in FAMILIES[name]]
    calls = [
        (next(k for k in kernels if not k.unsupported(spec, target)), spec, {}) for spec in SPECS
    ]
    return [t for t in collect(calls, (4,)) if t.batch == "single"]


def write_liar(target, task: Task, directory) -> str:
    """Compile a function like the task's that writes zeros."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    spec = task.spec
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name(SYMBOL)
        T.arg("x", T.buffer((1, spec.in_features), spec.dtype))
        for name, array in task.kernel.layout.arrays(spec).items():
            T.arg(name, T.buffer(array.shape, array.dtype))
        y = T.arg("y", T.buffer((1, spec.out_features), spec.out_dtype))
        with T.serial(0, spec.out_features) as i:
            T.buffer_store(y, T.float32(0), [0, i])
    path = directory / "liar.so"
    library = tvm.compile(ir.get(), target=target.to_tvm())
    library.export_library(str(path), fcompile=Builder(target)._link([], frozenset()))
    return str(path)


def run_on(address, target, tasks, directory, trials=6):
    settings = Settings(
        trials=trials, rpc=address, key="phone", patience=0, builders=1, rows=(4,), threads=1
    )
    work = directory / "work"
    work.mkdir()
    journal = Journal(directory / "trials.jsonl", {})
    with rpc_crew(settings, target, work) as crew:
        crew.effort = crew.confirm_effort = Effort(0.05, 3, 5)
        schedule = directory / f"{target.name}.toml"
        records = Run(tasks, target, settings, crew, journal, work, schedule)()
    journal.close()
    assert read_records(schedule) == sorted(records, key=lambda r: r.key)
    return records, journal


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["here", "arm"])
@pytest.mark.parametrize("fault", ["none", "dies", "lies"])
def test_devices_tune_together(tmp_path, machine, fault):
    reason = missing(machine)
    if reason:
        pytest.skip(reason)
    target = target_of(machine)
    tasks = make_tasks(target)
    faults = {
        "none": [],
        "dies": ["dies", "3"],
        "lies": ["lies", "1", write_liar(target, tasks[0], tmp_path)],
    }
    with rig(tmp_path, machine, "phone", [faults[fault], []]) as address:
        assert count_devices(address, "phone") == 2
        with pytest.raises(FairyError, match="no device 'tablet'; it has: phone"):
            count_devices(address, "tablet")
        records, journal = run_on(address, target, tasks, tmp_path)
    assert [r.task for r in records] == [t.text for t in tasks]
    assert {t.status for t in journal.trials} <= {"ok", "duplicate"}
    devices = {t.device for t in journal.trials if t.status == "ok"}
    if fault == "none":
        assert len(devices) == 2
        assert not journal.dropped
    if fault == "lies":
        (why,) = journal.dropped.values()
        assert "wrong numbers" in why
        assert not devices & set(journal.dropped)  # what it had measured does not count


def test_a_tracker_that_is_none_is_told():
    with pytest.raises(FairyError, match=r"no TVM RPC tracker answers.*rpc_tracker --host"):
        count_devices(("127.0.0.1", 1), "phone")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer():
            connection, _ = other.accept()
            connection.recv(4)
            connection.sendall(b"HTTP/1.1 400")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(FairyError, match="is no TVM RPC tracker"):
            count_devices(other.getsockname(), "phone")
        thread.join()


def test_addresses():
    assert parse_address("10.0.0.7:9190") == ("10.0.0.7", 9190)
    assert parse_address("[::1]:9190") == ("::1", 9190)
    for text in ("10.0.0.7", ":9190", "host:port", "host:70000"):
        with pytest.raises(FairyError, match="write HOST:PORT"):
            parse_address(text)
