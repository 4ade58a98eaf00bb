"""T for every layer under a budget of bits: what ``--bits`` means.

The budget is the mean of stored bits, scales included, over the weights of all layers that become
phase codes. Layers that the compiler computes in one call share a T, since different ones would
cost them that. Beginning with T = 1 everywhere, the step is taken again and again that saves the
most error for a stored bit, until none fits any more.

The error of a layer is an estimate of the loss it adds (`calibrate.sensitivity`) where there is
calibration text, and else the squared error of its weight, relative to the weight's square, times
its number of weights, `HEAD_WEIGHT` times that for the output head; then no layer gets a smaller T
than all of them could have.
`benchmarks/training_free.py` compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fairy_compile.config import MAX_STAGES, Granularity
from fairy_compile.errors import FairyError
from fairy_compile.frontends.packed import PackedLayer
from fairy_compile.frontends.packed_writer import layout_bytes, packed_layout
from fairy_compile.phase import quantize

# What `models` computes in one call, by the last parts of the names.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_EXPERT = re.compile(r"\.experts\.\d+$")
# Measured at T = 2 on a small model: with 13 % of the weights, the head made half of the loss.
HEAD_WEIGHT = 7
# The error of a large weight is that of so many complex rows.
_SAMPLE_ROWS = 256
_BAND = 64


@dataclass(frozen=True)
class Group:
    """Layers that share a T.

    Attributes:
        layers: their names.
        weights: real weights they have together.
        bits: T -> stored bits, scales included.
        errors: T -> error; the same keys.
    """

    layers: tuple[str, ...]
    weights: int
    bits: Mapping[int, int]
    errors: Mapping[int, float]


def stored_bits(layer: str, shape: tuple[int, ...], stages: int, scale: Granularity) -> int:
    """Return the bits a packed checkpoint stores for a layer."""
    packed = PackedLayer(stages, ("U", "W"), scale, (shape[0], shape[1]))
    return 8 * layout_bytes(packed_layout({layer: packed}, {}))


def group_layers(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Put layers together that are computed in one call: all experts of a layer are."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        parent, _, last = layer.rpartition(".")
        fused = next((parts[0] for parts in _FUSED if last in parts), last)
        groups.setdefault((_EXPERT.sub(".experts", parent), fused), []).append(layer)
    return [tuple(group) for group in groups.values()]


def make_groups(
    shapes: Mapping[str, tuple[int, ...]],
    errors: Mapping[str, Mapping[int, float]],
    scale: Granularity,
) -> list[Group]:
    """Return the groups of layers.

    Args:
        shapes: layer -> (2n, 2m).
        errors: layer -> T -> error; T that one layer of a group cannot have, none has.
        scale: granularity.
    """
    groups = []
    for layers in group_layers(list(shapes)):
        common = [t for t in errors[layers[0]] if all(t in errors[layer] for layer in layers)]
        if not common:  # one is pinned and another is not: they part
            parts = [(layer,) for layer in layers]
        else:
            parts = [layers]
        for part in parts:
            stages = common or list(errors[part[0]])
            groups.append(
                Group(
                    part,
                    sum(shapes[layer][0] * shapes[layer][1] for layer in part),
                    {t: sum(stored_bits(la, shapes[la], t, scale) for la in part) for t in stages},
                    {t: sum(errors[layer][t] for layer in part) for t in stages},
                )
            )
    return groups


def check_budget(groups: Sequence[Group], bits: float) -> None:
    """Check that a budget can be met and is not more than there is use for.

    Raises:
        FairyError: it is outside of what T = 1 to 4 can give.
    """
    weights = sum(group.weights for group in groups)
    least, most = (
        sum(pick(group.bits.values()) for group in groups) / max(weights, 1) for pick in (min, max)
    )
    if not least <= bits <= most:
        # Rounded inwards, so that the figures shown are themselves allowed.
        raise FairyError(
            f"--bits {bits:g} is outside of what T = 1 to 4 gives this model; allowed: "
            f"{np.ceil(least * 1000) / 1000:g} to {np.floor(most * 1000) / 1000:g} bits a weight, "
            "scales included"
        )


def choose_stages(groups: Sequence[Group], bits: float) -> dict[str, int]:
    """Return layer -> T under a budget.

    Args:
        groups: of layers.
        bits: most stored bits a weight, in the mean.

    Raises:
        FairyError: see `check_budget`.
    """
    check_budget(groups, bits)
    chosen = [min(group.bits) for group in groups]
    left = bits * sum(group.weights for group in groups)
    left -= sum(group.bits[t] for group, t in zip(groups, chosen, strict=True))
    while True:
        best, best_gain = None, 0.0
        for i, group in enumerate(groups):
            for t in group.bits:  # several stages at once, where the first alone saves little
                cost = group.bits[t] - group.bits[chosen[i]]
                if not 0 < cost <= left:
                    continue
                gain = (group.errors[chosen[i]] - group.errors[t]) / cost
                if gain > best_gain:
                    best, best_gain = (i, t, cost), gain
        if best is None:
            break
        i, chosen[i], cost = best
        left -= cost
    return {layer: t for group, t in zip(groups, chosen, strict=True) for layer in group.layers}


def uniform_stages(
    shapes: Mapping[str, tuple[int, ...]],
    pinned: Mapping[str, int],
    scale: Granularity,
    bits: float,
) -> int:
    """Return the largest T that all layers can have under a budget, at least 1.

    Errors of weights do not tell which layers can do with less: on a small model, letting some
    fall to T = 1 under 2.2 bits made the loss gap .22 nats, against .08 for T = 2 throughout.

    Args:
        shapes: layer -> (2n, 2m).
        pinned: layer -> T of those that have theirs already.
        scale: granularity.
        bits: most stored bits a weight, in the mean.
    """
    weights = sum(shape[0] * shape[1] for shape in shapes.values())
    for t in range(MAX_STAGES, 1, -1):
        stored = (
            stored_bits(layer, shape, pinned.get(layer, t), scale)
            for layer, shape in shapes.items()
        )
        if sum(stored) <= bits * weights:
            return t
    return 1


def weight_errors(
    weight: np.ndarray,
    stages: Sequence[int],
    scale: Granularity,
    method: Literal["phase", "alternating"],
) -> dict[int, float]:
    """Return T -> squared error relative to the square, times the number of weights.

    Args:
        weight: (2n, 2m), any float dtype.
        stages: the T.
        scale: granularity.
        method: of `phase.quantize`.
    """
    n = len(weight) // 2
    starts = np.arange(0, n, _BAND)
    chosen = starts[:: -(-len(starts) * _BAND // _SAMPLE_ROWS) or 1]
    rows = np.concatenate([np.arange(first, min(first + _BAND, n)) for first in chosen])
    part = weight[np.concatenate([rows, n + rows])].astype(np.float32)
    power = float(np.square(part).sum(dtype=np.float64))
    out = {}
    for t in stages:
        near = quantize(part, t, scale=scale, method=method).dequantize()
        lost = float(np.square(part - near).sum(dtype=np.float64))
        out[t] = lost / power * weight.size if power else 0.0
    return out
