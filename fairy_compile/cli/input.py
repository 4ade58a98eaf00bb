"""What stdin holds: prompts and messages."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fairy_compile.errors import FairyError


def is_terminal() -> bool:
    """Tell whether somebody types; nobody does where stdin was closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_text(read: Callable[[], str]) -> str:
    """Return what ``read`` reads from stdin.

    Raises:
        FairyError: it is no text.
    """
    try:
        return read()
    except UnicodeDecodeError as error:
        raise FairyError(
            f"stdin is not {error.encoding} text: {error.reason} at byte {error.start}; convert it"
        ) from error
