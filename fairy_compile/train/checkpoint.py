"""What makes a checkpoint of a run one that can be gone on from.

A checkpoint that was written to the end holds a file `COMPLETE`: its other files and their sizes,
as ``{"files": {name: bytes}}``. It is empty in checkpoints of earlier versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fairy_compile.errors import FairyError, ModelFileError

COMPLETE = "complete"
PREFIX = "checkpoint-"
_STATE = "trainer_state.json"  # which the Trainer reads before anything of it can be caught


def mark_complete(checkpoint: Path) -> None:
    """Note that all files of a checkpoint are written; a kill leaves some without the note."""
    files = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    partial = checkpoint / f"{COMPLETE}.partial"
    partial.write_text(json.dumps({"files": files}) + "\n", encoding="utf-8")
    partial.replace(checkpoint / COMPLETE)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to the end, the last one last."""
    found = [path for path in directory.glob(f"{PREFIX}*") if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def check_files(checkpoint: Path) -> None:
    """Check that a checkpoint holds what was written.

    The Trainer goes on without an optimiser's state, or with other random numbers, where their
    files are missing: a run that does not end like an uninterrupted one.

    Raises:
        ModelFileError: files are missing or cut off, or the state of the run cannot be read.
    """
    with reading(checkpoint):
        text = (checkpoint / COMPLETE).read_text(encoding="utf-8")
        for name, size in (json.loads(text)["files"] if text else {}).items():
            path = checkpoint / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found} bytes"
                raise ValueError(f"{name} is {state}; it was written with {size} bytes")
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a checkpoint is read into an error that names a way out.

    Raises:
        ModelFileError: something did.
    """
    try:
        yield
    except (FairyError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # readers of damaged tensors, pickles and texts raise anything
        others = [path for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
        way_out = (
            f"remove {checkpoint} to go on from {others[-1].name}"
            if others
            else f"remove {checkpoint.parent} to begin anew"
        )
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelFileError(f"{checkpoint} is damaged: {first:.200}; {way_out}") from error
