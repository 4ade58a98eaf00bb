"""A tuning run of two small calls on this machine, to be killed.

python -m tests.tune.killable DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from fairy_compile.kernels import FAMILIES
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import load_target
from fairy_compile.tune.api import journal_of, work_of
from fairy_compile.tune.crew import local_crew
from fairy_compile.tune.measure import Effort
from fairy_compile.tune.run import Run
from fairy_compile.tune.settings import Settings
from fairy_compile.tune.tasks import Task


def tasks() -> list[Task]:
    target = load_target("cpu")
    quantised = PhaseSpec((64,), 128, 2, ("U", "W"), "tensor", "int8")
    exact = PhaseSpec((64,), 128, 2, ("U", "W"), "tensor", "float")
    return [
        Task(kernel.name, spec, "single", (1,))
        for spec in (quantised, exact)
        for kernel in [
            next(k for f in target.kernels for k in FAMILIES[f] if not k.unsupported(spec, target))
        ]
    ]


def main(place: Path) -> None:
    settings = Settings(trials=8, patience=0, threads=1, builders=2)
    target = load_target("cpu")
    with (
        journal_of(place, {}, False) as journal,
        work_of(place) as work,
        local_crew(settings, target, work, 1 << 20) as crew,
    ):
        crew.effort = crew.confirm_effort = Effort(0.05, 3, 5)
        (place / "pids").write_text(" ".join(str(w.pid) for w in crew.workers))
        Run(tasks(), target, settings, crew, journal, work, place / "cpu.toml")()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
