"""Records: the tuned knobs of ``schedules/<name>.toml``, one table a kernel call.

    [[tuned]]
    task = "12288x4096 T=2 UW tensor int8"     # PhaseSpec.describe()
    kernel = "x86.codebook.avx512vbmi"
    batch = "single"
    values = { prefetch = 0 }                  # knobs that differ from the kernel's defaults
    rows = [1]                                 # rows of x that were timed
    median_us = [612.4]                        # with these knobs
    default_us = [731.0]                       # with the defaults, in turns in the same minutes
    gain = 1.194                               # default / tuned, of pairs in time; mean over rows
    spread = 0.012                             # half the interquartile range of those pairs' ratio
    device = "AMD EPYC 9R14, 2 threads"
    date = "2026-11-26"
    versions = "fairy-compile 0.1.0, apache-tvm 0.27.0.post1"

``demands``, where it is there, names knobs that the layers' weights need and that were not free.

A call, its demands and a device name a record; there is one for each, in a fixed order, so that
files of two people merge line by line. What stands above `MARK` in a file is left as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError
from fairy_compile.targets import tomllib

MARK = "# Measured by `fairy_compile tune`; it rewrites what follows. Notes belong above this line."

_TASK = re.compile(r"(\d+)x(\d+) T=(\d) (UW|W) (tensor|row|tile64) (\w+)")
_NAME = re.compile(r"[A-Za-z_][\w-]*")


@dataclass(frozen=True)
class Form:
    """A task's text, taken apart: real (out, in) features, and what else has to be equal."""

    shape: tuple[int, int]
    rest: str

    @classmethod
    def of(cls, task: str) -> Form:
        """Parse `PhaseSpec.describe`.

        Raises:
            ValueError: it is something else.
        """
        match = _TASK.fullmatch(task)
        if match is None:
            raise ValueError(f'task is {task!r}; expected such as "8192x4096 T=2 UW tensor int8"')
        out, columns = int(match[1]), int(match[2])
        if not (0 < out < 2**31 and 0 < columns < 2**31):
            raise ValueError(f"task is {task!r}; its sizes are out of range")
        return cls((out, columns), task.partition(" ")[2])

    def distance(self, other: Form) -> float:
        """Return how many doublings of height and width lie between two shapes."""
        pairs = zip(self.shape, other.shape, strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class Record:
    """One measured choice of knobs; see the module for the fields."""

    task: str
    kernel: str
    batch: str
    values: Mapping[str, Any]
    rows: tuple[int, ...]
    median_us: tuple[float, ...]
    default_us: tuple[float, ...]
    gain: float
    spread: float
    device: str
    date: str
    versions: str
    demands: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What the record is the only one for; also the order of a file."""
        out, columns = self.form.shape
        shape = f"{out:010d}x{columns:010d}"
        return self.kernel, self.batch, self.form.rest, shape, _inline(self.demands), self.device

    @property
    def form(self) -> Form:
        """The task, taken apart."""
        return Form.of(self.task)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> Record:
        """Read a table of a schedule file; ``where`` is what errors call it.

        Raises:
            FairyError: a field is missing or of a wrong type.
        """
        try:
            known = {f.name: table[f.name] for f in fields(cls) if f.name in table}
            for name, kind in _KINDS.items():
                if name not in known and name != "demands":
                    raise ValueError(f"{name} is missing")
                if name in known and not kind(known[name]):
                    raise ValueError(f"{name} is {known[name]!r}")
            for name in ("rows", "median_us", "default_us"):
                known[name] = tuple(known[name])
            record = cls(**known)
            if not len(record.rows) == len(record.median_us) == len(record.default_us):
                raise ValueError("rows, median_us and default_us differ in length")
            Form.of(record.task)
        except (TypeError, ValueError) as error:
            raise FairyError(
                f"{where}: {error}; tune again, or take the table [[tuned]] out"
            ) from error
        return record

    def to_text(self) -> str:
        """Return the record as a TOML table."""
        lines = ["[[tuned]]"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "demands" and not value:
                continue
            lines.append(f"{f.name} = {_inline(value)}")
        return "\n".join(lines)


def _is_table(value: Any) -> bool:
    plain = (str, int, float, bool)
    return isinstance(value, dict) and all(
        _NAME.fullmatch(k) and isinstance(v, plain) for k, v in value.items()
    )


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _is_times(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


_KINDS = {
    **dict.fromkeys(
        ("task", "kernel", "batch", "device", "date", "versions"), lambda v: isinstance(v, str)
    ),
    **dict.fromkeys(("values", "demands"), _is_table),
    **dict.fromkeys(("rows", "median_us", "default_us"), _is_times),
    **dict.fromkeys(("gain", "spread"), _is_number),
}


def _inline(value: Any) -> str:
    """Return a value in TOML."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{k} = {_inline(v)}" for k, v in sorted(value.items()))
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=True)  # the escapes of TOML's basic strings
    return repr(value)


def read_tables(path: Path) -> dict[str, Any]:
    """Return a schedule file parsed; empty where there is none.

    Raises:
        FairyError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "; it holds marks of a merge conflict: keep both sides' [[tuned]] tables"
        marked = "<<<<<<<" in path.read_bytes().decode("utf-8", "replace")
        raise FairyError(
            f"schedule file {path} is malformed: {error}{hint if marked else ''}"
        ) from error


def read_records(path: Path) -> list[Record]:
    """Return the records of a schedule file, as they stand; none where there is no file.

    Raises:
        FairyError: it is malformed.
    """
    tables = read_tables(path).get("tuned", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise FairyError(f"schedule file {path}: tuned is no array of tables; write [[tuned]]")
    return [
        Record.from_table(table, f"schedule file {path}, [[tuned]] table {number}")
        for number, table in enumerate(tables, 1)
    ]


def merge(*lists: Iterable[Record]) -> list[Record]:
    """Return the records of all lists, one for each key, in order.

    Of two with one key the one measured later stays; of one day, that with the larger gain, and
    then the one whose text comes first: the result does not depend on the order of the lists.
    """
    best: dict[tuple[str, ...], Record] = {}
    for record in (r for records in lists for r in records):
        rival = best.get(record.key)
        if rival is None or _rank(record) < _rank(rival):
            best[record.key] = record
    return [best[key] for key in sorted(best)]


def _rank(record: Record) -> tuple[Any, ...]:
    newest_first = tuple(-ord(letter) for letter in record.date)
    return newest_first, -record.gain, record.to_text()


def write_records(path: Path, records: Sequence[Record]) -> list[Record]:
    """Put ``records`` into a schedule file, which appears whole; returns all it then holds.

    They replace those of the same key, other than ones that were measured on a later day.

    Raises:
        FairyError: the file that is there is malformed, or it cannot be written.
    """
    from fairy_compile.results import save_files

    new = {record.key: record for record in records}
    old = [r for r in read_records(path) if r.key not in new or r.date > new[r.key].date]
    merged = merge(old, records)
    text = path.read_text("utf-8") if path.is_file() else ""
    above = text.partition(MARK)[0].rstrip()
    if MARK not in text and "[[tuned]]" in text:
        raise FairyError(
            f"schedule file {path} has tables [[tuned]] but not the line above them; put this "
            f"line before the first of them: {MARK}"
        )
    body = "\n\n".join(record.to_text() for record in merged)
    whole = "\n\n".join(part for part in (above, MARK, body) if part) + "\n"
    save_files([path], lambda partial: partial.write_text(whole, "utf-8"))
    return merged
