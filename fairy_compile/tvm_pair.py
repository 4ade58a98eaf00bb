"""The pinned pair of TVM packages, and the check that it is what is installed."""

from __future__ import annotations

import os
from importlib import metadata

from fairy_compile.errors import FairyError
from fairy_compile.user_cache import home_directory

# The two wheels must match exactly. apache-tvm's own metadata admits newer apache-tvm-ffi
# releases, with which serialising a function crashes the process.
TVM_PAIR = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def check_tvm_pair() -> None:
    """Raise `FairyError` with the pip command that mends it unless the pinned pair is installed.

    Also where TVM could not be imported, because it finds no place for a cache of its own.
    """
    seen = {}
    for package in TVM_PAIR:
        try:
            seen[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            seen[package] = "not installed"
    if seen != TVM_PAIR:
        found = ", ".join(f"{name} {version}" for name, version in seen.items())
        wanted = " ".join(f"{name}=={version}" for name, version in TVM_PAIR.items())
        raise FairyError(
            f"fairy_compile needs an exact pair of TVM packages and found {found}; "
            f"mend it with: pip install {wanted}"
        )
    if "XDG_CACHE_HOME" not in os.environ:
        home_directory()
