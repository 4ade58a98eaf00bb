"""Quantisation that looks at calibration text; needs PyTorch and transformers (extra ``train``).

    convert(model, output, calibrate="corpus.txt")       # what users call, `frontends.convert`

What happens, in the order of the files: `config` says what is asked for, `windows` cuts the text
into windows of tokens, `skeleton` holds the model with the weights of one decoder layer at a time,
`stream` runs the windows through it and gathers what every linear layer gets to see, `gptq` and
`refit` make codes and scales of that, `sensitivity` estimates what they cost, `run` strings these
together and resumes, `tune` fits scales to the whole model.
"""

from __future__ import annotations

import importlib.util

from fairy_compile.calibrate.config import Calibration
from fairy_compile.errors import FairyError

__all__ = ["Calibration", "check_packages"]

_NEEDED = ("torch", "transformers", "accelerate")


def check_packages() -> None:
    """Raise `FairyError` with the pip command unless the packages calibration needs are there."""
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise FairyError(
            f"calibration needs {', '.join(missing)}; install with "
            "pip install 'fairy_compile[train]'"
        )
