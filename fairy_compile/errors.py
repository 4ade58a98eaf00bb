"""The one exception users meet: what was wrong, what was seen, what is allowed, what to do."""

from __future__ import annotations


class FairyError(Exception):
    """A mistake in the user's input or surroundings, told in one sentence.

    The command line prints the message as one line and exits with status 2; Python users
    catch this class. Bugs in fairy_compile itself are never raised as ``FairyError``.
    """


class ModelFileError(FairyError):
    """A model file (checkpoint or artifact) is missing, truncated, corrupt or hostile."""


class UnsupportedError(FairyError):
    """The input is well formed, but this version or target cannot do what it asks for."""


def nearest(word: str, allowed: list[str]) -> str:
    """Return ``" Did you mean a, b?"`` for close names in ``allowed``, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, allowed, n=3, cutoff=0.4)
    return f" Did you mean {', '.join(close)}?" if close else ""
