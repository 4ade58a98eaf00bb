"""Which knobs a call is built with: ``schedules/<target>.toml``, reviewed like code.

Written by hand, for all calls of a kernel:

    [[knobs]]
    kernel = "x86.codebook.avx512vbmi"
    batch = "many"          # or "single"
    values = { tokens = 4 }

and measured by ``fairy_compile tune``, for one shape and those near it, which come first:
``[[tuned]]``, see `tune.records`. A knob that nothing names takes its kernel's default. Where the
target is the CPU of this machine, ``schedules/<cpu>.toml`` is read too, after LLVM's name of the
CPU, e.g. ``znver4``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError
from fairy_compile.kernels.base import Batch, PhaseKernel
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.targets import Target, schedules_directory
from fairy_compile.tune.records import Form, Record, read_records, read_tables

NEAR = 2.0
"""Doublings of height and width up to which a record serves another shape."""

_DEMANDS_APART = 0.5  # a record measured under other demands is that much further away


def schedule_names(target: Target) -> list[str]:
    """Return the stems of a target's schedule files; what is tuned goes into the last."""
    return [target.name, *([str(target.tvm["mcpu"])] if target.detected else [])]


def schedule_paths(target: Target) -> list[Path]:
    """Return a target's schedule files, whether they are there or not."""
    return [schedules_directory() / f"{name}.toml" for name in schedule_names(target)]


def load_knobs(target: Target) -> list[dict[str, Any]]:
    """Return the ``[[knobs]]`` of a target's schedule files, the CPU's last.

    Raises:
        FairyError: a file is malformed.
    """
    return [entry for path in schedule_paths(target) for entry in _read(path)]


def _read(path: Path) -> list[dict[str, Any]]:
    entries = read_tables(path).get("knobs", [])
    for entry in entries:
        if not {"kernel", "batch", "values"} <= set(entry) or not isinstance(entry["values"], dict):
            raise FairyError(
                f"schedule file {path} has the entry {entry!r}; expected kernel, batch and values"
            )
    return entries


def knobs_for(kernel: PhaseKernel, batch: Batch, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the knobs of ``kernel`` for one batch class from `load_knobs` entries.

    ``decode`` also takes those of ``many`` and of ``single``, whose results it has to give.

    Raises:
        FairyError: an entry names an unknown knob or value.
    """
    chosen: dict[str, Any] = {}
    sources = ("many", "single", "decode") if batch == "decode" else (batch,)
    ours = [e for e in entries if e["kernel"] == kernel.name and e["batch"] in sources]
    for entry in sorted(ours, key=lambda e: sources.index(e["batch"])):
        wrong = unknown_knobs(kernel, entry["values"])
        if wrong:
            known = "; ".join(f"{k}: {list(v)}" for k, v in kernel.knobs.items())
            raise FairyError(f"the schedule sets {kernel.name}'s knob {wrong}; allowed: {known}")
        chosen |= entry["values"]
    return chosen


def unknown_knobs(kernel: PhaseKernel, values: Mapping[str, Any]) -> str:
    """Return the first setting that ``kernel`` does not know, in words; empty if there is none."""
    for knob, value in values.items():
        if value not in kernel.knobs.get(knob, ()):
            return f"{knob} to {value!r}"
    return ""


@dataclass(frozen=True)
class Choice:
    """Knobs of a call, and where they are from.

    Attributes:
        values: knob -> value, where not the default.
        origin: ``tuned`` for this very call, ``near`` by one of another shape or other demands, or
            ``default``: no record is near enough.
        task: of the record that was used; empty for ``default``.
    """

    values: dict[str, Any]
    origin: str
    task: str = ""


class Schedules:
    """The knobs of a target: what its schedule files say of a call.

    Attributes:
        notes: what a user should know of the records that were used or passed over.
    """

    def __init__(self, target: Target) -> None:
        self._entries = load_knobs(target)
        self._records = [r for path in schedule_paths(target) for r in read_records(path)]
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> list[str]:
        """What a user should know of the records that calls met so far."""
        return list(self._notes)

    def choose(
        self, kernel: PhaseKernel, spec: PhaseSpec, batch: Batch, demands: Mapping[str, Any]
    ) -> Choice:
        """Return the knobs of a call; ``demands`` of its weights have the last word.

        Raises:
            FairyError: an entry ``[[knobs]]`` names an unknown knob or value.
        """
        own = self._choose(kernel, spec, batch, demands)
        if batch != "decode" or own.origin != "default":
            return own
        # Its results have to be those of `single`, so it takes what was tuned for that.
        many, single = (self._choose(kernel, spec, b, demands) for b in ("many", "single"))
        if many.origin == single.origin == "default":
            return own
        return Choice(many.values | single.values, single.origin, single.task)

    def _choose(
        self, kernel: PhaseKernel, spec: PhaseSpec, batch: Batch, demands: Mapping[str, Any]
    ) -> Choice:
        values = knobs_for(kernel, batch, self._entries)
        wanted = Form.of(spec.describe())
        near = []
        for record in self._records:
            if (record.kernel, record.batch) != (kernel.name, batch):
                continue
            form = record.form
            apart = form.distance(wanted) + _DEMANDS_APART * (record.demands != dict(demands))
            if form.rest == wanted.rest and apart <= NEAR and self._usable(kernel, record):
                near.append((apart, record))
        if not near:
            return Choice(values | dict(demands), "default")
        closest = min(apart for apart, _ in near)
        rivals = [record for apart, record in near if apart == closest]
        # By day, then by text, so that the order of files and tables decides nothing.
        record = max(rivals, key=lambda r: (r.date, r.gain, r.to_text()))
        if any(dict(r.values) != dict(record.values) for r in rivals):
            devices = ", ".join(sorted({r.device for r in rivals}))
            self._note(
                f"records of {record.task} ({batch}) differ between {devices}; that of "
                f"{record.date} on {record.device} was used"
            )
        self._note_age(record)
        origin = "near" if closest else "tuned"
        # Knobs that a record does not name were best at their kernel's defaults.
        return Choice(dict(record.values) | dict(demands), origin, record.task)

    def _usable(self, kernel: PhaseKernel, record: Record) -> bool:
        wrong = unknown_knobs(kernel, record.values)
        if wrong:
            self._note(
                f"the record of {record.task} ({record.batch}) sets {kernel.name}'s knob {wrong}, "
                f"which this version does not know ({record.versions}): it was passed over; tune "
                "again"
            )
        return not wrong

    def _note_age(self, record: Record) -> None:
        from fairy_compile.tune.versions import versions_text

        if record.versions != versions_text():
            self._note(
                f"records were measured with {record.versions}, and this is {versions_text()}: "
                "their knobs were used, but others may be faster now; `fairy_compile tune` "
                "measures again"
            )

    def _note(self, text: str) -> None:
        self._notes[text] = None
