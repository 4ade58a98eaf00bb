"""The user's cache: what is made or installed once and can be deleted at any time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fairy_compile.errors import FairyError

VARIABLE = "FAIRY_COMPILE_CACHE"
"""Environment variable that names another place for the cache."""


def home_directory() -> Path:
    """Return the user's home directory.

    Raises:
        FairyError: it is not known, as of a container's user without a name.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise FairyError(
            "this user has no home directory, and HOME is not set; set it to a directory for "
            "caches, as in HOME=/tmp/home"
        ) from error


def cache_directory() -> Path:
    """Return the cache's directory, which need not exist: the platform's, or `VARIABLE`'s.

    Raises:
        FairyError: see `home_directory`.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen))
    if sys.platform == "win32":
        given, usual = os.environ.get("LOCALAPPDATA"), "AppData/Local"
    elif sys.platform == "darwin":
        given, usual = None, "Library/Caches"
    else:
        given, usual = os.environ.get("XDG_CACHE_HOME"), ".cache"
    base = Path(os.path.expanduser(given)) if given else home_directory() / usual
    return base / "fairy_compile"
