"""Builders and devices that only pretend, in this process: the same outcomes every time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from fairy_compile.op import PhaseSpec
from fairy_compile.tune.builder import BuildRequest, Built
from fairy_compile.tune.crew import Crew
from fairy_compile.tune.measure import Lost, Measured, MeasureRequest, Unfit, Wrong
from fairy_compile.tune.slots import Slot
from fairy_compile.tune.tasks import Task
from fairy_compile.tune.workers import Reply

Knobs = Mapping[str, Any]
Surface = Callable[[Knobs], float]

X86 = "x86.codebook.avx512vbmi"


def make_task(batch="many", shape=(512, 256), kernel=X86, demands=None) -> Task:
    spec = PhaseSpec((shape[0] // 2,), shape[1] // 2, 2, ("U", "W"), "tensor", "int8")
    return Task(kernel, spec, batch, (1,) if batch == "single" else (4, 128), demands or {})


def bowl(knobs: Knobs) -> float:
    """Seconds of a made-up kernel: best at 4 tokens less, wide blocks, combined panels."""
    tokens = abs(math.log2(knobs["tokens"]) - 1)
    columns = abs(math.log2(knobs["columns"]) - 9)
    panels = {"combined": 0.0, "joint": 0.5, "split": 0.9, "words": 1.2}[knobs["panels"]]
    prefetch = 0.05 * (knobs["prefetch"] != 0)
    return 1e-3 * (1 + 0.12 * tokens + 0.07 * columns + panels + prefetch + 0.1 * tokens * columns)


class Crash(Exception):
    """The worker dies."""


class Hang(Exception):
    """The worker does not answer."""


class InlineWorker:
    """A `Worker` that serves a request when it is submitted, in this process."""

    def __init__(self, name: str, handler: Callable[[Any], Any]) -> None:
        self.name, self.handler = name, handler
        self.pipe, self._other = Pipe()
        self._request: Any = None
        self.deadline = None
        self.closed = False
        self.restarts = 0

    @property
    def idle(self) -> bool:
        return self._request is None

    def submit(self, request: Any, timeout: float) -> None:
        assert self.idle
        assert not self.closed
        self._request = request
        status, value = "ok", None
        try:
            value = self.handler(request)
        except Crash as error:
            status, value = "crash", str(error)
        except Hang as error:
            status, value = "timeout", str(error)
        except ValueError as error:
            status, value = "error", str(error)
        self._other.send((status, value))

    def poll(self) -> Reply | None:
        if not self.pipe.poll():
            return None
        status, value = self.pipe.recv()
        reply, self._request = Reply(self._request, status, value), None
        return reply

    def restart(self) -> None:
        assert self.idle
        self.restarts += 1

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeBuilder:
    """Writes the knobs as a library; ``matter`` are those that make a difference."""

    matter: tuple[str, ...] | None = None
    broken: Callable[[Knobs], bool] = lambda knobs: False
    built: int = 0

    def __call__(self, request: BuildRequest) -> Built:
        knobs = dict(request.knobs)
        if self.broken(knobs):
            raise ValueError("LLVM ran out of registers")
        kept = {k: v for k, v in knobs.items() if self.matter is None or k in self.matter}
        digest = f"object {json.dumps(kept, sort_keys=True)}"
        if digest in request.known:
            return Built(None, (digest,), digest)
        self.built += 1
        path = request.directory / f"{request.task.id}-{self.built}.so"
        path.write_text(json.dumps(knobs))
        return Built(path, (digest,))


@dataclass
class FakeDevice:
    """Measures by a formula.

    Attributes:
        name: of the device.
        surface: seconds of a call.
        noise: relative deviation of a measurement.
        dies_after: measurements, then the device is gone.
        lies_after: measurements, then even the default's numbers are wrong.
        slanders: knobs whose right numbers it gets wrong, though the default is right.
        wrong, crashes, hangs: knobs whose numbers are wrong, or that end it.
        silent: seconds are not reported by this factor.
    """

    name: str
    surface: Surface = bowl
    noise: float = 0.0
    dies_after: int = 10**9
    lies_after: int = 10**9
    slanders: Callable[[Knobs], bool] = lambda knobs: False
    wrong: Callable[[Knobs], bool] = lambda knobs: False
    crashes: Callable[[Knobs], bool] = lambda knobs: False
    hangs: Callable[[Knobs], bool] = lambda knobs: False
    count: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def __call__(self, request: MeasureRequest) -> Any:
        assert self.name not in request.banned
        self.count += 1
        knobs = json.loads(Path(request.library).read_text())
        default = json.loads(Path(request.baseline).read_text())
        if self.count > self.dies_after:
            first = self.count == self.dies_after + 1  # later ones find no device at all
            return Lost("connection reset by peer", self.name, begun=first)
        if self.count > self.lies_after:
            return Unfit("wrong numbers of the default knobs: 0 instead of 1", self.name)
        if self.crashes(knobs):
            raise Crash("the process was killed by SIGILL")
        if self.hangs(knobs):
            raise Hang("no answer within 1 s")
        if self.wrong(knobs) or self.slanders(knobs):
            return Wrong("1 of 512 outputs are wrong", self.name)
        before = self.surface(default)
        after = self.surface(knobs) * (1 + self.random.gauss(0, self.noise))
        n = len(request.task.rows)
        ratio = after / before
        return Measured((after,) * n, (before,) * n, (ratio,) * n, (self.noise,) * n, self.name)


def make_crew(*devices: FakeDevice, builder: FakeBuilder | None = None, remote=False) -> Crew:
    builders = [InlineWorker("build", builder or FakeBuilder())]
    slots = [Slot(InlineWorker(d.name, d), remote=remote) for d in devices]
    return Crew(builders, slots, timeout=1.0, exclusive=not remote)  # type: ignore[arg-type]
