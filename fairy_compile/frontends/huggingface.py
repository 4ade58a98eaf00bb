"""Hugging Face directories: config.json with dense safetensors or weights-only ``.bin`` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends.files import ModelDirectory, tied_tensors
from fairy_compile.frontends.method import (
    TRAINING_FREE,
    check_method,
    latents_reason,
    method_note,
    resolve,
)
from fairy_compile.frontends.plan import LayerPlan, plan_weight, quantize_layer
from fairy_compile.frontends.quant_json import read_quant, settle_own
from fairy_compile.frontends.store import TensorStore
from fairy_compile.phase import PhaseTensor
from fairy_compile.phase.quantize import check_finite


class HuggingFaceSource(ModelDirectory):
    """A `ModelSource` over dense weights; see `fairy_compile.frontends.source`.

    Attributes:
        latents: why the weights are taken for master weights of quantisation-aware training, or
            None for ordinary weights; see `fairy_compile.frontends.method`.
        trained: what they were trained for, where the checkpoint tells.
        makes_codes: True where `phase` knows more of a layer than its weight, which `convert` then
            asks for it.

    Raises:
        ModelFileError: weights are missing, incomplete or damaged.
        UnsupportedError: a tensor is not float32, float16 or bfloat16, or the checkpoint is
            quantised by another tool.
    """

    kind: Literal["huggingface"] = "huggingface"
    quant: QuantConfig | None = None
    makes_codes: bool = False

    def __init__(self, directory: Path, config: dict[str, Any]):
        self.latents = latents_reason(directory, config)
        table = config.get("quantization_config") or {}
        self.trained = read_quant(table["config"], directory) if "config" in table else None
        self._store = TensorStore.open(directory)
        super().__init__(directory, self._store.files)
        self.config = config
        self.tied = tied_tensors(config, self._store.infos)
        for name in self._store.infos:
            self._store.check_dtype(name)

    def names(self) -> list[str]:
        """Return all tensor names, those of tied weights last."""
        return [*self._store.infos, *self.tied]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._store.info(self.tied.get(name, name)).shape

    def dtype(self, name: str) -> str:
        """Return ``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        return self._store.info(self.tied.get(name, name)).dtype

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor as stored, checked finite."""
        array = self._store.read(self.tied.get(name, name))
        check_finite(array, name)
        return array

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Decide the method; master weights that tell what they were trained for decide more."""
        trained = None if asked.method in TRAINING_FREE else self.trained
        own = asked if trained is None else settle_own(trained, asked)
        used = resolve(own, self.latents, calibrated=calibrated, by_budget=by_budget)
        check_method(used, self.latents, calibrated=calibrated, by_budget=by_budget)
        note = method_note(asked, used, self.latents)
        if trained is not None:
            note += f"; they were trained for {own.quant}, scales per {own.scale}, which they keep"
        return used, note

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what `phase` would return, or why the layer stays dense."""
        return plan_weight(layer, self.shape(f"{layer}.weight"), resolve(quant, self.latents))

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Quantise ``<layer>.weight``."""
        quant = resolve(quant, self.latents)
        plan = self.plan(layer, quant)
        if not plan.phase:
            raise FairyError(f"{layer} stays dense: {plan.reason}; read it with dense()")
        return quantize_layer(self.dense(f"{layer}.weight"), layer, quant)[0]
