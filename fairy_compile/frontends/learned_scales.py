"""Hugging Face directories of Fairy2i models whose scales were learned (W1, one stage).

Beside ``<layer>.weight`` (2n, 2m), real master weights, lies ``<layer>.quant_scale``, of shape
(4, n/64, m/64): for every complex tile of 64x64 the scales of Re U, Im U, Re W and Im W, in this
order. Published models have none for the output head, which stays dense.

The codes follow from the master weights alone, by the rule of the kernels such models are trained
with: an entry is real where |Re| > |Im| and imaginary elsewhere, with the sign of that part, and
zero counts as positive. Only on the edges |Re| = |Im| does that differ from the rule of
`phase.quantize`. Weights in bfloat16 were trained in it: U and W are rounded to it before they are
compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends.huggingface import HuggingFaceSource
from fairy_compile.frontends.own_codes import ordinary, plan_codes, settle_codes
from fairy_compile.frontends.plan import LayerPlan
from fairy_compile.phase import PhaseTensor, pack_codes, to_widely_linear
from fairy_compile.phase.signed_scales import with_signed_scales
from fairy_compile.phase.tensor import TILE

SUFFIX = ".quant_scale"
PARTS = 4
REASON = "codes of master weights, with learned scales"
WITHOUT = "the model has no learned scales for it"
TRAINED = QuantConfig("w1", scale="tile64", method="phase")
"""What such models are trained for."""


class LearnedScaleSource(HuggingFaceSource):
    """A `ModelSource` over master weights with learned scales; see `frontends.source`.

    Raises:
        ModelFileError: as `HuggingFaceSource`; scales are of no layer, or of another shape.
        UnsupportedError: see `HuggingFaceSource`.
    """

    makes_codes = True

    def __init__(self, directory: Path, config: dict[str, Any]):
        super().__init__(directory, config)
        self.latents = self.latents or "their scales were learned"
        self.trained = TRAINED
        names = [name for name in self._store.infos if name.endswith(SUFFIX)]
        self._scaled = frozenset(name.removesuffix(SUFFIX) for name in names)
        for layer in self._scaled:
            self._check(layer)
        self._check_complete()

    def _check(self, layer: str) -> None:
        weight, infos = f"{layer}.weight", self._store.infos
        if weight not in infos or len(infos[weight].shape) != 2:
            raise ModelFileError(
                f"{self.directory} has {layer}{SUFFIX} and no matrix {weight}; download it again"
            )
        rows, columns = infos[weight].shape
        want = (PARTS, rows // (2 * TILE), columns // (2 * TILE))
        found = infos[layer + SUFFIX].shape
        if rows % (2 * TILE) or columns % (2 * TILE) or found != want:
            raise ModelFileError(
                f"{self.directory}: {layer}{SUFFIX} has the shape {found} for a weight of "
                f"{rows}x{columns}; expected (4, rows / 128, columns / 128), whole numbers: scales "
                "of Re U, Im U, Re W and Im W for complex tiles of 64x64, of one stage"
            )

    def _check_complete(self) -> None:
        """Refuse scales that only some of the decoder layers have for one of their parts."""
        parts = {layer.rpartition(".")[2] for layer in self._scaled}
        for name in self._store.infos:
            layer = name.removesuffix(".weight")
            if layer != name and layer.rpartition(".")[2] in parts and layer not in self._scaled:
                raise ModelFileError(
                    f"{self.directory} has scales for other layers' {layer.rpartition('.')[2]} and "
                    f"no {layer}{SUFFIX}; download it again"
                )

    def names(self) -> list[str]:
        """Return all tensor names but those of scales."""
        return [name for name in super().names() if not name.endswith(SUFFIX)]

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Return what the model was trained for; layers without scales are a choice.

        Raises:
            FairyError: the request is about choosing other codes.
        """
        used = settle_codes(
            self.directory,
            f"a Fairy2i model with learned scales ({SUFFIX[1:]})",
            TRAINED,
            self._scaled,
            asked,
            calibrated=calibrated,
            by_budget=by_budget,
        )
        note = (
            f"a Fairy2i model with learned scales: T = 1, a scale per tile64; {len(self._scaled)} "
            "layers have them, others stay dense (--layer-quant LAYER=w3 gives those codes, too)"
        )
        return used, note

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what `phase` would return, or why the layer stays dense."""
        own = LayerPlan(True, 1, ("U", "W"), "tile64", REASON)
        shape = self.shape(f"{layer}.weight")
        return plan_codes(layer, shape, own if layer in self._scaled else None, WITHOUT, quant)

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Return a layer's codes with its learned scales; others are quantised as asked."""
        plan = self.plan(layer, quant)
        if not plan.phase:
            raise FairyError(f"{layer} stays dense: {plan.reason}; read it with dense()")
        if layer not in self._scaled:
            return super().phase(layer, ordinary(quant))
        return with_learned_scales(
            self.dense(f"{layer}.weight"), self.dense(layer + SUFFIX).astype(np.float32)
        )


def with_learned_scales(weight: np.ndarray, scales: np.ndarray) -> PhaseTensor:
    """Return master weights as codes of one stage with the scales learned for them.

    Args:
        weight: (2n, 2m) in float32, float16 or bfloat16.
        scales: float32 (4, n/64, m/64), of Re U, Im U, Re W and Im W.
    """
    codes = []
    for re, im in to_widely_linear(weight.astype(np.float32)):
        if weight.dtype == ml_dtypes.bfloat16:
            re, im = (part.astype(ml_dtypes.bfloat16).astype(np.float32) for part in (re, im))
        imaginary = ~(np.abs(re) > np.abs(im))
        negative = np.where(imaginary, im, re) < 0
        codes.append(imaginary.astype(np.uint8) | (negative.astype(np.uint8) << 1))
    return with_signed_scales(
        pack_codes(np.stack(codes)[None]), scales.reshape(1, 2, 2, *scales.shape[1:])
    )
