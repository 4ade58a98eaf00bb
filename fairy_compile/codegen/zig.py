"""Finding zig, which compiles C++ for and links foreign machines."""

from __future__ import annotations

import importlib.util
import shutil
import sys


def zig_command() -> list[str] | None:
    """Return the command that runs zig: the package ``ziglang``, or the program on the path."""
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang"]
    found = shutil.which("zig")
    return [found] if found else None
