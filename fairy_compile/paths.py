"""Paths as users give them."""

from __future__ import annotations

import os
from pathlib import Path

from fairy_compile.errors import FairyError


def as_path(what: str, value: object) -> Path:
    """Return the path that a user gave, with ``~`` for the home directory.

    Args:
        what: how the error calls it, such as ``"the output"``.
        value: text, a `pathlib.Path`, or another `os.PathLike` of text.

    Raises:
        FairyError: it is none of these, or holds a zero character, which no file's name can.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise FairyError(f"{what} is {value!r:.80}; allowed: a path, as text or pathlib.Path")
    if "\0" in text:
        raise FairyError(f"{what} is {text!r:.80}, with a zero character; allowed: a path")
    return Path(os.path.expanduser(text))
