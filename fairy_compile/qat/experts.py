"""Experts of mixtures in training: three-dimensional parameters that go through the phase rule.

transformers holds the experts of a layer in two parameters: gate_up_proj, (experts, 2 inner,
hidden), gate above up, and down_proj, (experts, hidden, inner). Checkpoints hold a matrix for every
projection of every expert, which is what `build` reads: each is quantised for itself, with its own
scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fairy_compile.config import Granularity, QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.plan import LayerPlan, plan_weight
from fairy_compile.phase.quantize import FAIRY2I_MIN_SCALE
from fairy_compile.qat.rule import quantized_weight

# How checkpoints call what modules call NAME.mlp.experts, and gate, up and down in it.
_NAMES = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
_MODULE = "mlp.experts"
PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Projection:
    """A projection of all experts of a layer.

    Attributes:
        name: in the checkpoint, with ``{}`` for the expert.
        shape: (out_features, in_features) of one expert.
        experts: how many there are.
        plan: what becomes of it.
    """

    name: str
    shape: tuple[int, int]
    experts: int
    plan: LayerPlan

    def names(self) -> list[str]:
        """Return the checkpoint's layers, one an expert."""
        return [self.name.format(i) for i in range(self.experts)]


class PhaseExperts(nn.Module):
    """Marks modules of experts whose weights are phase-quantised when they run.

    `convert_experts` makes them, by giving a module of transformers a class that derives from its
    own and this. Parameters keep their names and shapes.

    Attributes:
        projections: gate, up and down.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale.
    """

    projections: tuple[Projection, Projection, Projection]
    scale: Granularity
    min_scale: float
    _frozen: dict[str, torch.Tensor] | None

    def quantized_weights(self) -> dict[str, torch.Tensor]:
        """Return parameter name -> value to compute with, straight-through in the backward pass."""
        gate, up, down = self.projections
        both = self.gate_up_proj
        halves = both.unflatten(1, (2, -1))  # (experts, gate or up, inner, hidden)
        if gate.plan == up.plan:
            both = self._quantise(halves, gate).flatten(1, 2)
        else:
            parts = zip(halves.unbind(1), (gate, up), strict=True)
            both = torch.cat([self._quantise(part, which) for part, which in parts], dim=1)
        return {"gate_up_proj": both, "down_proj": self._quantise(self.down_proj, down)}

    def _quantise(self, weight: torch.Tensor, projection: Projection) -> torch.Tensor:
        if not projection.plan.phase:
            return weight
        return quantized_weight(weight, projection.plan.stages, self.scale, self.min_scale)

    def freeze(self, frozen: bool) -> None:
        """Keep the quantised values for all calls to come, or stop doing so."""
        self._frozen = self.quantized_weights() if frozen else None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the experts with quantised weights."""
        values = self._frozen if self._frozen is not None else self.quantized_weights()
        # What stands in the instance itself is found before parameters are.
        self.__dict__.update(values)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in values:
                del self.__dict__[name]


@lru_cache
def _phase_class(cls: type[nn.Module]) -> type[PhaseExperts]:
    return type(f"Phase{cls.__name__}", (PhaseExperts, cls), {})


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module of experts held in parameters of three dimensions."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    }


def phase_experts(model: nn.Module) -> dict[str, PhaseExperts]:
    """Return name -> module of the experts that `convert_experts` converted."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PhaseExperts)}


def plan_experts(
    model: nn.Module, quant: QuantConfig
) -> dict[str, tuple[Projection, Projection, Projection]]:
    """Decide what becomes of all experts of a model; changes nothing.

    Raises:
        UnsupportedError: the model is of no family whose experts can be trained, or ``quant``
            treats experts of one layer differently.
    """
    return {n: _plan_layer(model, n, module, quant) for n, module in find_experts(model).items()}


def _plan_layer(
    model: nn.Module, name: str, module: nn.Module, quant: QuantConfig
) -> tuple[Projection, Projection, Projection]:
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    shapes = {own: tuple(p.shape) for own, p in module.named_parameters(recurse=False)}
    if family not in _NAMES or set(shapes) != set(PARAMETERS) or not name.endswith(_MODULE):
        known = ", ".join(sorted(_NAMES))
        raise UnsupportedError(
            f"{name} of a {family} model holds the weights of experts in {', '.join(shapes)}, "
            f"which training does not convert; it does those of {known}. `fairy_compile convert` "
            "and `build` quantise without training"
        )
    path, leaves = _NAMES[family]
    prefix = name.removesuffix(_MODULE) + path
    experts, double, hidden = shapes["gate_up_proj"]
    inner = double // 2
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    found = []
    for leaf, shape in zip(leaves, sizes, strict=True):
        pattern = f"{prefix}.{{}}.{leaf}"
        plans = [plan_weight(pattern.format(i), shape, quant) for i in range(experts)]
        if any(plan != plans[0] for plan in plans):
            raise UnsupportedError(
                f"the configuration treats the experts {pattern.format('*')} differently, which "
                "training cannot; name all of them or none in exempt and stages_for"
            )
        found.append(Projection(pattern, shape, experts, plans[0]))
    return found[0], found[1], found[2]


def convert_experts(
    module: nn.Module,
    projections: tuple[Projection, Projection, Projection],
    scale: Granularity,
    min_scale: float = FAIRY2I_MIN_SCALE,
) -> None:
    """Make a module of experts compute with phase codes, in place.

    Raises:
        FairyError: the module shares its weights or was converted before.
    """
    if isinstance(module, PhaseExperts):
        raise FairyError("the experts compute with phase codes already; prepare a model once")
    module.__class__ = _phase_class(type(module))
    module.projections, module.scale, module.min_scale = projections, scale, min_scale
    module._frozen = None


@contextmanager
def frozen_experts(model: nn.Module) -> Iterator[None]:
    """Compute the experts' quantised weights once for the whole block; see `layers.frozen`."""
    modules = list(phase_experts(model).values())
    try:
        with torch.no_grad():
            for module in modules:
                module.freeze(True)
        yield
    finally:
        for module in modules:
            module.freeze(False)
