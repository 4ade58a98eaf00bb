"""Tuned knobs: ``schedules/<target>.toml``, written by a tuner, reviewed like code, read by builds.

    [[knobs]]
    kernel = "x86.codebook.avx512vbmi"
    batch = "many"          # or "single"
    values = { tokens = 4 }

A knob that no entry names takes its kernel's default. Where the target is the CPU of this machine,
``schedules/<cpu>.toml`` is read too, after LLVM's name of the CPU, e.g. ``znver4``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError
from fairy_compile.kernels.base import Batch, PhaseKernel
from fairy_compile.targets import Target, schedules_directory, tomllib


def load_knobs(target: Target) -> list[dict[str, Any]]:
    """Return the entries of a target's schedule files, the CPU's last; none if it has no file.

    Raises:
        FairyError: a file is malformed.
    """
    names = [target.name, *([str(target.tvm["mcpu"])] if target.detected else [])]
    return [entry for name in names for entry in _read(schedules_directory() / f"{name}.toml")]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        entries = tomllib.loads(path.read_text("utf-8")).get("knobs", [])
    except tomllib.TOMLDecodeError as error:
        raise FairyError(f"schedule file {path} is malformed: {error}") from error
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
        for knob, value in entry["values"].items():
            if value not in kernel.knobs.get(knob, ()):
                known = "; ".join(f"{k}: {list(v)}" for k, v in kernel.knobs.items())
                raise FairyError(
                    f"the schedule sets {kernel.name}'s knob {knob} to {value!r}; allowed: {known}"
                )
            chosen[knob] = value
    return chosen
