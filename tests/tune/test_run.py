"""Whole runs with simulated builders and devices: records, going on, reports, the display."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fairy_compile.targets import load_target
from fairy_compile.tune.display import line_of, picture, seconds_left
from fairy_compile.tune.measure import ReadRequest
from fairy_compile.tune.records import read_records
from fairy_compile.tune.report import convergence, failures, render, rows_of, write_html
from fairy_compile.tune.run import Run
from fairy_compile.tune.settings import Settings
from fairy_compile.tune.trials import Journal
from tests.tune.simulated import FakeBuilder, FakeDevice, bowl, make_crew, make_task

TARGET = replace(load_target("cpu"), detected=False)
TASKS = [make_task("many", shape) for shape in ((512, 256), (256, 256), (1024, 256))]


class Reader(FakeDevice):
    def __call__(self, request):
        return 1e10 if isinstance(request, ReadRequest) else super().__call__(request)


def start(tmp_path: Path, crew, trials=60, watch=None, **options):
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    journal = Journal(tmp_path / "trials.jsonl", {})
    settings = Settings(trials=trials, patience=0, **options)
    schedule = tmp_path / "cpu.toml"
    return Run(TASKS, TARGET, settings, crew, journal, work, schedule, watch), journal


def test_every_task_gets_a_record(tmp_path):
    run, journal = start(tmp_path, make_crew(Reader("here")))
    records = run()
    assert read_records(tmp_path / "cpu.toml") == sorted(records, key=lambda r: r.key)
    assert [r.task for r in records] == [t.text for t in TASKS]
    assert len([t for t in journal.trials if t.counts]) == 60
    assert all(r.gain > 1.05 and r.device == "here" and r.rows == (4, 128) for r in records)
    assert list((tmp_path / "work").iterdir()) == []
    # Later searches begin with what was best for earlier ones.
    second = [t for t in journal.trials if t.task == TASKS[1].id]
    assert second[0].knobs | records[0].values == second[0].knobs
    # A second session has nothing to do.
    journal.close()
    device = Reader("here")
    again, journal = start(tmp_path, make_crew(device))
    assert again() == records
    assert device.count == 0


def test_tasks_without_a_trial_get_no_record_and_keep_the_one_they_had(tmp_path):
    run, journal = start(tmp_path, make_crew(Reader("here")))
    before = run()
    journal.close()
    (tmp_path / "trials.jsonl").unlink()
    run, journal = start(tmp_path, make_crew(Reader("here")), trials=2)
    records = run()
    assert [r.task for r in records] == [t.text for t in TASKS[:2]]
    assert all(r.default_us[0] > 0 for r in records)
    held = {r.task: r for r in read_records(tmp_path / "cpu.toml")}
    assert held[TASKS[2].text] == before[2]
    journal.close()
    # With a larger budget it goes on there.
    run, journal = start(tmp_path, make_crew(Reader("here")), trials=6)
    assert [r.task for r in run()] == [t.text for t in TASKS]
    assert [t for t in journal.trials if t.task == TASKS[2].id]


def test_time_that_is_over_leaves_the_rest(tmp_path):
    run, journal = start(tmp_path, make_crew(Reader("here")), minutes=1e-9)
    assert not run()
    assert not journal.finished
    assert not (tmp_path / "cpu.toml").exists()


def test_tasks_that_a_liar_finished_are_done_again(tmp_path):
    liar = FakeDevice("phone a", surface=lambda k: 1e-6 / bowl(k), lies_after=45)
    crew = make_crew(liar, FakeDevice("phone b"), remote=True)
    run, journal = start(tmp_path, crew, trials=90, rpc=("tracker", 1), key="phone")
    records = run()
    assert read_records(tmp_path / "cpu.toml") == sorted(records, key=lambda r: r.key)
    assert set(journal.dropped) == {"phone a"}
    assert {t.device for t in journal.trials if t.status == "ok"} == {"phone b"}
    best = min(map(bowl, all_knobs()))
    for record in records:
        assert bowl(full(record.values)) <= best * 1.05


def all_knobs():
    from fairy_compile.tune.space import Space

    space = Space.of(TASKS[0])
    return [space.knobs(p) for p in space.points()]


def full(values):
    return all_knobs()[0] | dict(values)


def test_report_and_display(tmp_path):
    seen = []

    def watch(status):
        if status.run is not None and status.trials > 5:
            seen.append((line_of(status), seconds_left(status)))
            console = Console(record=True, width=140, file=(tmp_path / "screen").open("w"))
            console.print(picture(status))
            seen.append(console.export_text())

    builder = FakeBuilder(broken=lambda knobs: knobs["prefetch"] == 8192)
    crew = make_crew(Reader("here", crashes=lambda k: k["tokens"] == 1), builder=builder)
    run, journal = start(tmp_path, crew, watch=watch)
    records = run()
    decode = [make_task("single", (1 << 14, 1 << 14))] * 8  # so that the model is no small one
    rows = rows_of([*TASKS, *decode], [*records, *[records[0]] * 8], journal)[: 2 * len(TASKS)]
    assert all(r.read_share is None for r in rows_of(TASKS, records, journal))
    assert [(r.rows, r.read_share is None) for r in rows[:2]] == [(4, False), (128, True)]
    assert rows[0].gb_per_s * 1e9 == rows[0].read_share * 1e10 or rows[0].read_share < 0.01
    assert json.loads(json.dumps([r.to_json() for r in rows]))
    text = render(rows)
    assert TASKS[0].text in text
    assert f"{records[0].gain:.2f}x" in text
    told = " ".join(failures(journal))
    assert "crashed" in told
    assert "LLVM ran out of registers" in told
    write_html(tmp_path / "report.html", "<title>", rows, journal)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;title&gt;" in page
    assert page.count("<polyline") == len(TASKS)
    course = convergence([t for t in journal.trials if t.task == TASKS[0].id])
    assert course == sorted(course)
    lines = [entry for entry in seen if isinstance(entry, tuple)]
    assert any("GB/s" in line and left is not None for line, left in lines)
    screen = seen[-1]
    assert "of 60 trials" in screen
    assert "searching" in screen
