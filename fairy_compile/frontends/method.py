"""Which quantisation method fits a checkpoint: what ``--method auto`` means.

Quantisation-aware training leaves *master weights* (latents): real weights that stand for the codes
the published rule makes of them, so they need exactly that rule. Ordinary weights were never
trained for it and lose much less under methods that fit codes to weights. Both look alike: the
distribution of the values tells nothing reliable. So ``auto`` goes by what a checkpoint says of
itself, and says what it took it for:

1. config.json has a ``quantization_config`` with ``"quant_method": "fairy2i", "latents": true``,
   as the export of `fairy_compile.qat` writes: ``phase``.
2. Its hub id, its directory, ``_name_or_path`` in config.json or the title of its README.md names
   Fairy2i, as the published W2 checkpoint's do, which is stored as ordinary Llama weights:
   ``phase``.
3. Anything else is an ordinary checkpoint: ``gptq`` with calibration text, else ``alternating``.

Master weights without a sign of it are then quantised by a method that is not theirs; whoever has
such a checkpoint says ``--method phase``. Weights that already hold phase values are taken apart
exactly under every method (`frontends.baked`).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from fairy_compile.config import QUANTS, QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError

LATENT_QUANT_METHOD = "fairy2i"
HEAD = "lm_head"
HEAD_STAGES = 3
TRAINING_FREE = ("alternating", "gptq")

_FAIRY2I = re.compile(r"fairy2i", re.IGNORECASE)
_README_BYTES = 4096
_TEXT = {"alternating": "", "gptq": ", with calibration text"}


def latents_reason(directory: Path, config: dict[str, Any]) -> str | None:
    """Tell why the weights of a directory are taken for master weights, or None.

    Args:
        directory: the model directory.
        config: its config.json.

    Raises:
        UnsupportedError: ``quantization_config`` is another tool's, or of a form not known here.
    """
    table = config.get("quantization_config")
    if table:
        method = table.get("quant_method") if isinstance(table, dict) else table
        if method != LATENT_QUANT_METHOD:
            raise UnsupportedError(
                f"{directory} is already quantised by {method!r}; allowed: an unquantised "
                "checkpoint, or one that `fairy_compile convert` wrote"
            )
        if table.get("latents") is not True:
            raise UnsupportedError(
                f"{directory}: the quantization_config of {method!r} has latents = "
                f"{table.get('latents')!r}; allowed: true, for master weights"
            )
        return "config.json calls its weights master weights"
    for name in _names(directory, config):
        if _FAIRY2I.search(name):
            return f"it is named {name!r}"
    return None


def _names(directory: Path, config: dict[str, Any]) -> list[str]:
    """Return what a model directory is called, in its own files and by where it lies."""
    here = directory.resolve()
    names = [here.name]
    if here.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/<revision>
        names.append(here.parent.parent.name)
    if isinstance(config.get("_name_or_path"), str):
        names.append(config["_name_or_path"])
    readme = directory / "README.md"
    if readme.is_file():
        with readme.open("rb") as file:
            lines = file.read(_README_BYTES).decode("utf-8", "replace").splitlines()
        names += [line for line in lines if line.startswith("# ")][:1]
    return names


def resolve(
    quant: QuantConfig,
    latents: str | None,
    *,
    calibrated: bool = False,
    by_budget: bool = False,
) -> QuantConfig:
    """Return ``quant`` with ``auto`` decided and the output head's T filled in.

    Methods without training give the output head (``lm_head``) T = 3 where less was asked for: a
    seventh of the weights of a small model, it made more than half of the loss at T = 2. Any entry
    of ``stages_for`` that names it has precedence.

    Args:
        quant: what was asked for; already resolved ones come back unchanged.
        latents: see `latents_reason`.
        calibrated: there is calibration text.
        by_budget: T is chosen under a budget of bits, the head's too.
    """
    method = quant.method
    if method == "auto":
        method = "phase" if latents else "gptq" if calibrated else "alternating"
    stages_for = dict(quant.stages_for)
    raises_head = method in TRAINING_FREE and QUANTS[quant.quant] < HEAD_STAGES
    if raises_head and not by_budget and not (quant.names_stages(HEAD) or quant.is_exempt(HEAD)):
        stages_for[HEAD] = HEAD_STAGES
    return dataclasses.replace(quant, method=method, stages_for=stages_for)


def check_method(
    used: QuantConfig, latents: str | None, *, calibrated: bool, by_budget: bool
) -> None:
    """Check that the method fits what else was asked for.

    Args:
        used: after `resolve`.
        latents: see `latents_reason`.
        calibrated: there is calibration text.
        by_budget: T is chosen under a budget of bits.

    Raises:
        FairyError: the method needs calibration text, or has no use for it or for a budget.
    """
    if used.method == "gptq" and not calibrated:
        raise FairyError(
            "--method gptq looks at calibration text; give some with --calibrate PATH, or use "
            "--method alternating"
        )
    if used.method == "phase" and latents and (calibrated or by_budget):
        flag = "--calibrate" if calibrated else "--bits"
        raise FairyError(
            f"{flag} does not go with master weights of quantisation-aware training, which need "
            f"the very codes of the published rule, and these are some, since {latents}; leave "
            f"{flag} out, or add --method {'gptq' if calibrated else 'alternating'} if they are "
            "ordinary weights"
        )
    if calibrated and used.method != "gptq":
        raise FairyError(
            f"--method {used.method} looks at no calibration text; leave --calibrate or --method "
            "out, or use --method gptq"
        )


def method_note(asked: QuantConfig, used: QuantConfig, latents: str | None) -> str:
    """Return a sentence on the method used, why, and how to choose another.

    Args:
        asked: before `resolve`.
        used: after it.
        latents: see `latents_reason`.
    """
    if asked.method != "auto":
        note = f"method {used.method}, as asked for"
    elif used.method == "phase":
        note = (
            f"method phase, the published rule: the model holds master weights of "
            f"quantisation-aware training, since {latents}; --method alternating overrides"
        )
    else:
        note = (
            f"method {used.method}{_TEXT[used.method]}: nothing says that the weights were trained "
            "for the phase rule; if they are master weights of quantisation-aware training, use "
            "--method phase"
        )
    if HEAD in used.stages_for and HEAD not in asked.stages_for:
        t = QUANTS[used.quant]
        note += f"; {HEAD} has T = {HEAD_STAGES} (--layer-quant {HEAD}=w{t} overrides)"
    return note
