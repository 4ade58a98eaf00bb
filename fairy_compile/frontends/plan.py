"""Which layers become phase codes and which stay dense, decided from names and shapes alone."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import numpy as np

from fairy_compile.config import Granularity, QuantConfig, Term
from fairy_compile.errors import UnsupportedError
from fairy_compile.frontends.baked import recover_baked
from fairy_compile.phase import PhaseTensor, quantize

# Two-dimensional weights that are looked up or multiplied elementwise, not applied as a matrix.
NOT_LINEAR = ("*embed*.weight", "*wte.weight", "*wpe.weight", "*norm*.weight")

BY_RULE = "quantised by the phase rule"


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


def plan_weight(layer: str, shape: tuple[int, ...], quant: QuantConfig) -> LayerPlan:
    """Decide what becomes of the dense weight ``<layer>.weight``.

    Args:
        layer: e.g. ``"model.layers.0.self_attn.q_proj"``.
        shape: (out_features, in_features).
        quant: the quantisation asked for.

    Raises:
        UnsupportedError: ``quant`` asks for the terms of a natively complex model.
    """
    if quant.terms != ("U", "W"):
        raise UnsupportedError(
            f"{layer} is a real matrix and cannot take the terms {quant.terms}; "
            "use the terms ('U', 'W')"
        )
    if not is_linear(f"{layer}.weight", shape):
        return LayerPlan.dense("not a linear layer")
    if (pattern := exempting_pattern(layer, quant)) is not None:
        return LayerPlan.dense(f"exempt by pattern {pattern!r}")
    for size in shape:
        if size % 2:
            return LayerPlan.dense(f"odd dimension {size}")
        if size == 0:
            return LayerPlan.dense("empty")
    stages = quant.stages(layer)
    return LayerPlan(True, stages, quant.terms, quant.scale, BY_RULE)


def quantize_layer(weight: np.ndarray, layer: str, quant: QuantConfig) -> tuple[PhaseTensor, str]:
    """Turn a layer's dense weight into phase codes; also return how, in words.

    A weight that already holds the values of a phase tensor of the same T and granularity is
    taken apart exactly; any other is quantised by the published rule.

    Args:
        weight: (2n, 2m) in float32, float16 or bfloat16.
        layer: name, for errors and per-layer T.
        quant: the quantisation asked for.
    """
    baked = recover_baked(weight, quant.stages(layer), quant.scale)
    if baked is not None:
        return baked, "recovered from a weight that holds phase values"
    return quantize(weight, quant, name=layer), BY_RULE
