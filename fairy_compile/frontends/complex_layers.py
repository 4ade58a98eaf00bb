"""Hugging Face directories of natively complex models (iFairy, `model_type: complexnet`).

A complex layer is stored as two matrices, ``<layer>.weight_real`` and ``<layer>.weight_imag``, and
computes y = w conj(x). Here it appears as every other layer does: as ``<layer>.weight``, the real
map (2n, 2m) on [re, im],

    [Re w   Im w]
    [Im w  -Re w]

The weights are master weights, and the published rule with the W term makes their codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends.huggingface import HuggingFaceSource
from fairy_compile.frontends.own_codes import refuse_other_codes
from fairy_compile.frontends.plan import BY_RULE, LayerPlan, exempting_pattern
from fairy_compile.frontends.quant_json import settle_own
from fairy_compile.phase import PhaseTensor, quantize_complex_layer

MODEL_TYPES = ("complexnet",)
PARTS = ("weight_real", "weight_imag")
PUBLISHED = QuantConfig("w1", scale="tensor", terms=("W",), method="phase")
"""What the published models were trained for."""


class ComplexSource(HuggingFaceSource):
    """A `ModelSource` over complex master weights; see `fairy_compile.frontends.source`.

    Raises:
        ModelFileError: as `HuggingFaceSource`; a part of a complex layer is missing, the parts
            differ in shape or dtype, or there is no complex layer.
        UnsupportedError: see `HuggingFaceSource`.
    """

    makes_codes = True

    def __init__(self, directory: Path, config: dict[str, Any]):
        super().__init__(directory, config)
        self._complex = _complex_layers(self._store.infos, directory)
        if self.trained is not None and self.trained.terms != ("W",):
            raise ModelFileError(
                f"{directory}: the quantization_config has the terms {self.trained.terms}; "
                f"expected ('W',) for model_type {config.get('model_type')!r}"
            )

    def names(self) -> list[str]:
        """Return all tensor names; a complex layer appears once, as ``<layer>.weight``."""
        names = []
        for name in self._store.infos:
            layer, _, part = name.rpartition(".")
            if layer not in self._complex:
                names.append(name)
            elif part == PARTS[0]:
                names.append(f"{layer}.weight")
        return names

    def _layer(self, name: str) -> str | None:
        layer, _, part = name.rpartition(".")
        return layer if part == "weight" and layer in self._complex else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a complex layer (2n, 2m)."""
        if layer := self._layer(name):
            n, m = self._store.info(f"{layer}.{PARTS[0]}").shape
            return 2 * n, 2 * m
        return super().shape(name)

    def dtype(self, name: str) -> str:
        """Return the stored dtype; of a complex layer that of its parts."""
        layer = self._layer(name)
        return super().dtype(f"{layer}.{PARTS[0]}" if layer else name)

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor as stored, checked finite; of a complex layer the real map."""
        if layer := self._layer(name):
            re, im = self._parts(layer)
            return np.block([[re, im], [im, -re]])
        return super().dense(name)

    def _parts(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        re, im = (super(ComplexSource, self).dense(f"{layer}.{part}") for part in PARTS)
        return re, im

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Return what the model was trained for; only activations and exempt layers are a choice.

        Raises:
            FairyError: the request is about choosing other codes.
        """
        own = self.trained or PUBLISHED
        named = {} if asked.stages_for == own.stages_for else asked.stages_for
        refuse_other_codes(
            self.directory,
            "a natively complex model",
            own,
            asked,
            next(iter(named), None),
            calibrated=calibrated,
            by_budget=by_budget,
        )
        note = (
            f"a natively complex model: term W, T = {own.quant[1:]}, scales per {own.scale}, by "
            "the published rule"
        )
        return settle_own(own, asked), note

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what `phase` would return, or why the layer stays dense."""
        if layer not in self._complex:
            self._store.info(f"{layer}.weight")
            return LayerPlan.dense("a real layer of a natively complex model")
        if (pattern := exempting_pattern(layer, quant)) is not None:
            return LayerPlan.dense(f"exempt by pattern {pattern!r}")
        return LayerPlan(True, quant.stages(layer), ("W",), quant.scale, BY_RULE)

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Quantise a complex layer by the published rule."""
        plan = self.plan(layer, quant)
        if not plan.phase:
            raise FairyError(f"{layer} stays dense: {plan.reason}; read it with dense()")
        re, im = self._parts(layer)
        return quantize_complex_layer(re, im, plan.stages, scale=quant.scale)


def _complex_layers(infos: dict[str, Any], directory: Path) -> frozenset[str]:
    """Return the layers whose two parts are matrices, checked to belong together."""
    layers = set()
    for name, info in infos.items():
        layer, _, part = name.rpartition(".")
        if part not in PARTS:
            continue
        other = f"{layer}.{PARTS[1 - PARTS.index(part)]}"
        if other not in infos:
            raise ModelFileError(f"{directory} has {name} and no {other}; download it again")
        if (infos[other].shape, infos[other].dtype) != (info.shape, info.dtype):
            raise ModelFileError(
                f"{directory}: {name} is {info.dtype} {info.shape} and {other} "
                f"{infos[other].dtype} {infos[other].shape}; they must be alike"
            )
        if len(info.shape) == 2:
            layers.add(layer)
    if not layers:
        raise ModelFileError(
            f"{directory} has no complex layer: looked for matrices <layer>.{PARTS[0]} and "
            f"<layer>.{PARTS[1]}"
        )
    return frozenset(layers)
