"""The directory of an unfinished run: what it was started with, and where to go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fairy_compile.errors import FairyError
from fairy_compile.train.checkpoint import COMPLETE, PREFIX, check_files, complete_checkpoints
from fairy_compile.train.config import TrainConfig

RUN_FILE = "run.json"
# Settings that do not change the result.
_FREE = ("output", "log_every", "save_every", "eval_every")


def open_run(config: TrainConfig, processes: int, *, force: bool) -> Path | None:
    """Start a run in its directory, or find the checkpoint to go on from.

    Args:
        config: of the run.
        processes: how many train together.
        force: begin anew where the directory holds checkpoints of other settings.

    Returns:
        The last checkpoint that was written to the end, None for a start from the beginning.

    Raises:
        FairyError: the directory holds checkpoints of other settings, or something else.
        ModelFileError: the last checkpoint is damaged.
    """
    directory, settings = config.run_directory, _settings(config, processes)
    path = directory / RUN_FILE
    if path.is_file():
        before = _read(path)
        differing = _differences(before, settings)
        checkpoint = last_checkpoint(directory)
        if not differing:
            if checkpoint is not None:
                check_files(checkpoint)
            return checkpoint
        if checkpoint is not None and not force:
            raise FairyError(
                f"{directory} holds an unfinished run with other settings "
                f"({', '.join(differing)}); repeat its command to go on, add --force to begin "
                "anew, or choose another --output"
            )
        for entry in directory.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    elif any(directory.iterdir()):
        raise FairyError(
            f"{directory} is in the way: it holds files that no training run wrote; remove it or "
            "choose another --output"
        )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return None


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Make the run directory and keep other trainings out of it until the block ends.

    Raises:
        FairyError: another process trains there, or the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FairyError(
            f"cannot create {directory}: {error.strerror}; choose another --output"
        ) from error
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows cannot lock a directory
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except BlockingIOError as error:
            raise FairyError(
                f"another process trains in {directory}; wait for it, or choose another --output"
            ) from error
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            directory.rmdir()  # only succeeds where nothing was written


def _settings(config: TrainConfig, processes: int) -> dict[str, Any]:
    settings = {key: value for key, value in config.to_json().items() if key not in _FREE}
    return json.loads(json.dumps(settings | {"processes": processes}))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what settings were and are, in words, of those that differ."""
    there, here = _single(before), _single(now)
    return [
        f"{key}: {there.get(key)!r} there, {value!r} now"
        for key, value in here.items()
        if key not in there or there[key] != value
    ]


def _single(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of the quantisation among them; no two have the same name."""
    rest = {key: value for key, value in settings.items() if key != "quant"}
    quant = settings.get("quant")
    return (quant if isinstance(quant, dict) else {"quant": quant}) | rest


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FairyError(f"{path} is damaged: {error}; remove {path.parent}") from error
    return value if isinstance(value, dict) else {}


def last_checkpoint(directory: Path) -> Path | None:
    """Return the last complete checkpoint; those a kill left half written are removed."""
    for path in directory.glob(f"{PREFIX}*"):
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    return next(reversed(complete_checkpoints(directory)), None)
