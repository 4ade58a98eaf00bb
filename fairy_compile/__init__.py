"""fairy_compile: the compiler that puts Fairy2i and iFairy models on phones, laptops and GPUs.

    import fairy_compile as fc
    report = fc.build("path/to/model", target="cpu", quant="w2", output="dist/x")
    model = fc.load("dist/x")
    print(model.generate("Hello", max_tokens=32, temperature=0.0))

Everything heavy (TVM, transformers, torch) is imported where it is used, so importing this
package is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError

if TYPE_CHECKING:
    from fairy_compile.artifact import inspect, verify
    from fairy_compile.compiler import build
    from fairy_compile.evaluation import evaluate
    from fairy_compile.frontends import convert
    from fairy_compile.phase import PhaseTensor, quantize
    from fairy_compile.runtime import load

__version__ = "0.1.0"

_LAZY = {
    "build": "fairy_compile.compiler",
    "convert": "fairy_compile.frontends",
    "evaluate": "fairy_compile.evaluation",
    "inspect": "fairy_compile.artifact",
    "load": "fairy_compile.runtime",
    "quantize": "fairy_compile.phase",
    "PhaseTensor": "fairy_compile.phase",
    "verify": "fairy_compile.artifact",
}

__all__ = [
    "FairyError",
    "ModelFileError",
    "PhaseTensor",
    "QuantConfig",
    "UnsupportedError",
    "__version__",
    "build",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> object:
    import importlib

    if name == "qat":
        return importlib.import_module("fairy_compile.qat")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
