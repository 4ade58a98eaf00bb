"""Which layers become phase codes and which stay dense, decided from names and shapes alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fairy_compile.config import QUANTS, Granularity, QuantConfig, Term
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.baked import recover_baked
from fairy_compile.phase import FAIRY2I_MIN_SCALE, PhaseTensor, quantize
from fairy_compile.phase.quantize import check_range

# Two-dimensional weights that are looked up or multiplied elementwise, not applied as a matrix.
NOT_LINEAR = ("*embed*.weight", "*wte.weight", "*wpe.weight", "*norm*.weight")
# Routers of mixtures of experts: small, and every later product hangs on their choice.
ROUTERS = ("*.mlp.gate.weight", "*.block_sparse_moe.gate.weight")

BY_RULE = "quantised by the phase rule"
BY_METHOD = {
    "phase": BY_RULE,
    "alternating": "codes and scales fitted to each other (alternating)",
    "gptq": "codes and scales by the errors of outputs on calibration text (gptq)",
}
RECOVERED = "recovered from a weight that holds phase values"


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        phase: True for phase codes, False for a dense matrix.
        stages: T, 0 for a dense layer.
        terms: ("U", "W") or ("W",), () for a dense layer.
        scale: granularity of the scales, "" for a dense layer.
        reason: why, in words, e.g. ``"odd dimension 33"``.
    """

    phase: bool
    stages: int
    terms: tuple[Term, ...]
    scale: Granularity | str
    reason: str

    @classmethod
    def dense(cls, reason: str) -> LayerPlan:
        """Return the plan of a layer that stays dense."""
        return cls(False, 0, (), "", reason)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether the tensor ``name`` is the weight of a linear layer (lm_head included)."""
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_LINEAR)
    )


def exempting_pattern(layer: str, quant: QuantConfig) -> str | None:
    """Return the exempt pattern that keeps ``layer`` dense, or None."""
    return next((p for p in quant.exempt if fnmatch.fnmatchcase(layer, p)), None)


def unmatched_notes(quant: QuantConfig, layers: Collection[str]) -> list[str]:
    """Return a note for every pattern of ``quant`` that names none of the linear ``layers``.

    A pattern is compared with the whole name, so ``q_proj`` alone matches nothing.
    """
    patterns = {"--exempt": quant.exempt, "--layer-quant": quant.stages_for}
    return [
        f"{flag} {pattern!r} matches no linear layer and changes nothing; layers are named like "
        f"{next(iter(layers))}, and * stands for any part"
        for flag, given in patterns.items()
        for pattern in given
        if layers and not any(fnmatch.fnmatchcase(layer, pattern) for layer in layers)
    ]


def plan_weight(layer: str, shape: tuple[int, ...], quant: QuantConfig) -> LayerPlan:
    """Decide what becomes of the dense weight ``<layer>.weight``, judging by its name.

    Args:
        layer: e.g. ``"model.layers.0.self_attn.q_proj"``.
        shape: (out_features, in_features).
        quant: the quantisation asked for.

    Raises:
        UnsupportedError: ``quant`` asks for the terms of a natively complex model.
    """
    if not is_linear(f"{layer}.weight", shape):
        _check_terms(layer, quant)
        return LayerPlan.dense("not a linear layer")
    routes = any(fnmatch.fnmatchcase(f"{layer}.weight", pattern) for pattern in ROUTERS)
    if routes and exempting_pattern(layer, quant) is None:
        _check_terms(layer, quant)
        return LayerPlan.dense("routes tokens to experts")
    return plan_linear(layer, shape, quant)


def plan_linear(layer: str, shape: tuple[int, ...], quant: QuantConfig) -> LayerPlan:
    """Decide what becomes of the weight of what is known to be a linear layer.

    Args and errors are those of `plan_weight`.
    """
    _check_terms(layer, quant)
    if (pattern := exempting_pattern(layer, quant)) is not None:
        return LayerPlan.dense(f"exempt by pattern {pattern!r}")
    for size in shape:
        if size % 2:
            return LayerPlan.dense(f"odd dimension {size}")
        if size == 0:
            return LayerPlan.dense("empty")
    stages = quant.stages(layer)
    return LayerPlan(True, stages, quant.terms, quant.scale, method_words(quant, stages))


def _check_terms(layer: str, quant: QuantConfig) -> None:
    if quant.terms != ("U", "W"):
        raise UnsupportedError(
            f"{layer} is a real matrix and cannot take the terms {quant.terms}; "
            "use the terms ('U', 'W')"
        )


def method_words(quant: QuantConfig, stages: int) -> str:
    """Return how codes are made, in words; with one stage, alternating is the rule itself."""
    words = BY_METHOD["phase" if stages == 1 or quant.method == "auto" else quant.method]
    if stages != QUANTS[quant.quant]:
        words += f"; T = {stages} for this layer"
    return words


def _method(quant: QuantConfig) -> Literal["phase", "alternating"]:
    """Return the method for a weight of which nothing more is known than ``quant``."""
    return "alternating" if quant.method == "alternating" else "phase"


def recover_layer(weight: np.ndarray, layer: str, quant: QuantConfig) -> PhaseTensor | None:
    """Take a weight that holds phase values apart, or return None if it does not hold any.

    A weight of the T of the whole model, in a layer that has more stages planned, comes back with
    stages on top whose scales are the least there are.

    Args:
        weight: (2n, 2m) in float32, float16 or bfloat16.
        layer: name, for per-layer T.
        quant: the quantisation asked for.

    Raises:
        FairyError: values that have no phase form, see `check_range`.
    """
    check_range(weight, layer)
    planned = quant.stages(layer)
    for stages in dict.fromkeys((planned, min(planned, QUANTS[quant.quant]))):
        baked = recover_baked(weight, stages, quant.scale)
        if baked is not None:
            break
    else:
        return None
    more = planned - stages
    if not more:
        return baked
    codes = np.concatenate([baked.codes, np.zeros((more, *baked.codes.shape[1:]), np.uint8)])
    least = np.full((more, *baked.scales.shape[1:]), FAIRY2I_MIN_SCALE, baked.scales.dtype)
    scales = np.concatenate([baked.scales, least])
    return PhaseTensor(codes, scales, baked.n, baked.m, baked.terms, baked.scale)


def quantize_layer(weight: np.ndarray, layer: str, quant: QuantConfig) -> tuple[PhaseTensor, str]:
    """Turn a layer's dense weight into phase codes; also return how, in words.

    A weight that already holds the values of a phase tensor of the same T and granularity is
    taken apart exactly; any other is quantised by the method of ``quant``.

    Args:
        weight: (2n, 2m) in float32, float16 or bfloat16.
        layer: name, for errors and per-layer T.
        quant: the quantisation asked for; a method ``"auto"`` is the published rule here, since
            what speaks for another is known of whole models (`frontends.method.resolve`).
    """
    baked = recover_layer(weight, layer, quant)
    if baked is not None:
        return baked, RECOVERED
    if quant.method == "gptq":
        raise FairyError(
            f"{layer} is to be quantised by its outputs on calibration text (gptq), which takes "
            "the whole model: use `fairy_compile convert --calibrate`, or --method alternating"
        )
    words = method_words(quant, quant.stages(layer))
    return quantize(weight, quant, method=_method(quant), name=layer), words
