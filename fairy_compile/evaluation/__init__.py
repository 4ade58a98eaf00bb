"""How good a compiled model is: perplexity on any text, distance to another model, lm-eval tasks.

`evaluate` (also ``fc.evaluate``) cuts a text into windows as the papers do and scores every token;
with ``against`` it runs a second model on the same windows: another artifact, or a Hugging Face
directory in PyTorch. `evaluate_tasks` hands the model to the lm-eval harness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairy_compile.evaluation.result import Comparison, EvalResult, Score
from fairy_compile.evaluation.windows import Window, cut_windows

if TYPE_CHECKING:
    from fairy_compile.evaluation.run import evaluate
    from fairy_compile.evaluation.tasks import evaluate_tasks

_LAZY = {
    "evaluate": "fairy_compile.evaluation.run",
    "evaluate_tasks": "fairy_compile.evaluation.tasks",
}

__all__ = [
    "Comparison",
    "EvalResult",
    "Score",
    "Window",
    "cut_windows",
    "evaluate",
    "evaluate_tasks",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
