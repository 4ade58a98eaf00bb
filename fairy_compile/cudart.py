"""NVIDIA's CUDA runtime library, which TVM's CUDA runtime is linked with."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

NAME = "libcudart.so.13"


def load_first(paths: Sequence[str]) -> bool:
    """Open the first of some libraries that can be opened; tell whether there was one."""
    for path in paths:
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return True
    return False


def load_cudart() -> bool:
    """Open the CUDA runtime: where the system finds it, of a toolkit, or from pip (PyTorch's)."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = [str(home / "lib64" / NAME), str(home / "lib" / NAME)]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        found += [str(path) for path in Path(root).glob(f"*/lib/{NAME}")]
    return load_first([NAME, *found])
