"""Checkpoints whose layers have codes of their own, and some have none: what can be asked of them.

Layers with codes keep them. Those without stay dense, as published models have their output head,
unless they are named: then codes are fitted to them as to ordinary weights.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection
from pathlib import Path

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends.plan import LayerPlan, exempting_pattern, plan_weight
from fairy_compile.frontends.quant_json import settle_own


def refuse_other_codes(
    place: Path,
    what: str,
    own: QuantConfig,
    asked: QuantConfig,
    layer_quant: str | None,
    *,
    calibrated: bool,
    by_budget: bool,
) -> None:
    """Refuse requests about choosing other codes than a checkpoint's own.

    Args:
        place, what, own, asked, calibrated, by_budget: see `settle_codes`.
        layer_quant: a pattern of ``--layer-quant`` that cannot be followed, or None.

    Raises:
        FairyError: there is such a request.
    """
    refused = {
        "--calibrate": calibrated,
        "--bits": by_budget,
        f"--method {asked.method}": asked.method not in ("auto", "phase"),
        f"--scale {asked.scale}": asked.scale not in ("tensor", own.scale),
        f"--layer-quant {layer_quant}": layer_quant is not None,
    }
    for flag, given in refused.items():
        if given:
            raise FairyError(
                f"{place} is {what}, which has the codes and scales it was trained for; leave "
                f"{flag} out"
            )


def settle_codes(
    place: Path,
    what: str,
    own: QuantConfig,
    coded: Collection[str],
    asked: QuantConfig,
    *,
    calibrated: bool,
    by_budget: bool,
) -> QuantConfig:
    """Return a checkpoint's own settings with what was asked for of layers without codes.

    Args:
        place: the checkpoint, for errors.
        what: what it is, e.g. ``"a packed checkpoint"``.
        own: how its codes were made.
        coded: layers that have codes.
        asked: the request.
        calibrated: there is calibration text.
        by_budget: T is chosen under a budget of bits.

    Raises:
        FairyError: the request is about choosing other codes.
    """
    named = [
        pattern
        for pattern in asked.stages_for
        if any(fnmatch.fnmatchcase(layer, pattern) for layer in coded)
    ]
    refuse_other_codes(
        place,
        what,
        own,
        asked,
        next(iter(named), None),
        calibrated=calibrated,
        by_budget=by_budget,
    )
    return settle_own(dataclasses.replace(own, stages_for=asked.stages_for), asked)


def plan_codes(
    layer: str,
    shape: tuple[int, ...],
    own: LayerPlan | None,
    without: str,
    quant: QuantConfig,
) -> LayerPlan:
    """Tell what becomes of a layer.

    Args:
        layer: its name.
        shape: (out_features, in_features).
        own: its codes, None if it has none.
        without: why it has none.
        quant: what `settle_codes` returned.
    """
    if own is None:
        plan = plan_weight(layer, shape, ordinary(quant))
        return plan if quant.names_stages(layer) or not plan.phase else LayerPlan.dense(without)
    if (pattern := exempting_pattern(layer, quant)) is not None:
        return LayerPlan.dense(f"exempt by pattern {pattern!r}")
    return own


def ordinary(quant: QuantConfig) -> QuantConfig:
    """Return how a layer becomes codes that was not trained for any."""
    return dataclasses.replace(quant, method="alternating")
