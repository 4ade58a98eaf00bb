"""The journal of a run: one JSON line for everything that happened, so that it can go on.

A line is written, flushed and synced when a trial ends. A run that is killed loses the trials under
way: one on each device. A last line that is cut off is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError

FORMAT = 1
OK = "ok"
STATUSES = (OK, "duplicate", "wrong", "build", "crash", "timeout")


@dataclass(frozen=True)
class Trial:
    """One candidate and what came of it.

    Attributes:
        task: `Task.id`.
        knobs: all of them.
        status: ``ok``; ``duplicate``, the same binary as another; ``wrong`` numbers; ``build``
            failed; ``crash``; or ``timeout``.
        score: seconds over those of the default, geometric mean over rows; `search.FAILED` where
            there is none.
        seconds, default_seconds, ratios, spreads: see `measure.Measured`.
        device: that measured it.
        reason: of a failure, in words.
        digests: of the binary, see `builder.Built`.
        at: seconds since the start of the run's first session.
    """

    task: str
    knobs: Mapping[str, Any]
    status: str
    score: float
    seconds: tuple[float, ...] = ()
    default_seconds: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()
    device: str = ""
    reason: str = ""
    digests: tuple[str, ...] = ()
    at: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether it is paid from the budget: a duplicate was not measured."""
        return self.status != "duplicate"


class Journal:
    """The file ``trials.jsonl``.

    Attributes:
        trials: that count, in order; those of devices that were found out to lie are gone.
        finished: task id -> what `finish` was given.
        seconds: the run took so far, all sessions together.
        dropped: device -> why it was dropped.
        read_bytes_per_second: plain reads of memory on the machine that measures; 0 if not known.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, read_only: bool = False) -> None:
        """Open a journal, new or of an earlier session of the same run.

        Raises:
            FairyError: the file is another run's, or damaged, or in use by another process.
        """
        self.path = path
        self.trials: list[Trial] = []
        self.finished: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self.dropped: dict[str, str] = {}
        self.read_bytes_per_second = 0.0
        self.resumed = path.exists() and path.stat().st_size > 0
        if read_only:
            self._read(dict(identity))
            return
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._lock()
        kept = self._read(dict(identity)) if self.resumed else 0
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._write({"format": FORMAT, "run": dict(identity)})

    def add(self, trial: Trial) -> None:
        """Append a trial; it is on disk when this returns."""
        self.trials.append(trial)
        self.seconds = max(self.seconds, trial.at)
        plain = {k: v for k, v in asdict(trial).items() if v not in ((), "", None)}
        self._write({"trial": plain})

    def finish(self, task: str, result: Mapping[str, Any], at: float) -> None:
        """Note the end of a task."""
        self.finished[task] = dict(result)
        self.seconds = max(self.seconds, at)
        self._write({"finished": task, "result": dict(result), "at": at})

    def drop(self, device: str, reason: str, *, void: bool) -> list[Trial]:
        """Note that a device is out; with ``void``, its trials never were. Returns those.

        Tasks that it had a share in are not finished then.
        """
        self.dropped[device] = reason
        gone = self._void(device) if void else []
        self._write({"dropped": device, "reason": reason, "void": void})
        return gone

    def note_bandwidth(self, bytes_per_second: float) -> None:
        """Note how fast the machine that measures reads memory."""
        self.read_bytes_per_second = bytes_per_second
        self._write({"read_bytes_per_second": bytes_per_second})

    def _void(self, device: str) -> list[Trial]:
        gone = [t for t in self.trials if t.device == device]
        self.trials = [t for t in self.trials if t.device != device]
        for task in {t.task for t in gone}:
            self.finished.pop(task, None)
        return gone

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise FairyError(
                f"{self.path} is in use by another run; wait for it, or give another -o"
            ) from error

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, identity: dict[str, Any]) -> int:
        """Take in a file; returns the bytes of its whole lines."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry, identity)
                else:
                    self._take(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FairyError(
                    f"{self.path}, line {number} is damaged: {error}; take the file away, or give "
                    "--force to start anew"
                ) from error
        return whole

    def _check(self, entry: dict[str, Any], identity: dict[str, Any]) -> None:
        if entry["format"] != FORMAT:
            raise FairyError(f"{self.path} is of another version; give --force to start anew")
        if entry["run"] != identity:
            theirs = entry["run"]
            names = [k for k in identity if theirs.get(k) != identity[k]]
            raise FairyError(
                f"{self.path} is of a run with other {', '.join(names)}: "
                f"{', '.join(str(theirs.get(k)) for k in names)[:200]}; give another -o, or "
                "--force to start anew"
            )

    def _take(self, entry: dict[str, Any]) -> None:
        if "trial" in entry:
            known = {f.name for f in fields(Trial)}
            values = {
                k: tuple(v) if isinstance(v, list) else v
                for k, v in entry["trial"].items()
                if k in known
            }
            trial = Trial(**values)
            if trial.status not in STATUSES or not trial.score > 0:
                raise ValueError(f"a trial has status {trial.status!r}, score {trial.score!r}")
            self.trials.append(trial)
            self.seconds = max(self.seconds, trial.at)
        elif "finished" in entry:
            self.finished[entry["finished"]] = dict(entry["result"])
            self.seconds = max(self.seconds, float(entry["at"]))
        elif "dropped" in entry:
            device = entry["dropped"]
            self.dropped[device] = entry["reason"]
            if entry["void"]:
                self._void(device)
        elif "read_bytes_per_second" in entry:
            self.read_bytes_per_second = float(entry["read_bytes_per_second"])
        else:
            raise ValueError("an entry of no known kind")
