"""Training: a real-valued checkpoint and text become a checkpoint of phase codes.

Built on the transformers Trainer, so it runs on one CPU, one GPU, or many under torchrun.
"""

from __future__ import annotations

import importlib.util

from fairy_compile.errors import FairyError
from fairy_compile.train.config import PRECISIONS, SCHEDULES, TrainConfig

__all__ = ["PRECISIONS", "SCHEDULES", "TrainConfig", "plan", "train"]

_NEEDED = ("torch", "transformers", "accelerate")


def __getattr__(name: str) -> object:
    if name not in ("plan", "train", "TrainReport", "Progress"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise FairyError(
            f"training needs {', '.join(missing)}; install with pip install 'fairy_compile[train]'"
        )
    from fairy_compile.train import run

    return getattr(run, name)
