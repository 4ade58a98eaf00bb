"""The user's cache: what is made or installed once and can be deleted at any time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "FAIRY_COMPILE_CACHE"
"""Environment variable that names another place for the cache."""


def cache_directory() -> Path:
    """Return the cache's directory, which need not exist: the platform's, or `VARIABLE`'s."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fairy_compile"
