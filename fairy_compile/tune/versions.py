"""What a measurement belongs to beside its device: the versions that generate code."""

from __future__ import annotations

from functools import cache

_PACKAGES = ("fairy-compile", "apache-tvm")


@cache
def versions_text() -> str:
    """Return such as ``fairy-compile 0.1.0, apache-tvm 0.27.0.post1``."""
    from fairy_compile.bench.machine import versions

    found = versions(_PACKAGES)
    return ", ".join(f"{name} {found[name]}" for name in _PACKAGES if name in found)
