"""How `convert` comes by the codes of a layer: from its weight alone, or by calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fairy_compile.config import MAX_STAGES, QuantConfig
from fairy_compile.frontends.budget import (
    HEAD_WEIGHT,
    choose_stages,
    make_groups,
    uniform_stages,
    weight_errors,
)
from fairy_compile.frontends.method import HEAD
from fairy_compile.frontends.plan import is_linear, quantize_layer
from fairy_compile.frontends.source import LayerPlan, ModelSource
from fairy_compile.phase import PhaseTensor

if TYPE_CHECKING:
    from fairy_compile.calibrate import Calibration
    from fairy_compile.calibrate.sensitivity import Losses
    from fairy_compile.calibrate.solutions import Solutions

Progress = Callable[[str, int, int], None]

# The error of large layers is measured on every k-th band of rows, this many at most. 64 rows, so
# that a band holds whole tiles of every granularity.
_BAND = 64
_MAX_BANDS = 8


@dataclass(frozen=True)
class Made:
    """How a layer came about; errors are those of `convert.LayerReport`."""

    reason: str
    nmse: float
    output_error: float | None = None
    loss: float | None = None


class Maker(Protocol):
    """Makes the phase layers of a model.

    Attributes:
        notes: sentences on what `prepare` did.
    """

    notes: list[str]

    def prepare(self, work: Path, progress: Progress | None) -> QuantConfig:
        """Do what comes before single layers, files in ``work``; return with T of every layer."""

    def make(self, layer: str, weight: np.ndarray) -> tuple[PhaseTensor, Made]:
        """Return a layer, given its dense weight (2n, 2m)."""

    def dense(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return what to store for a dense tensor."""


def phase_plans(source: ModelSource, quant: QuantConfig) -> dict[str, LayerPlan]:
    """Return layer -> plan of all linear layers of a model."""
    return {
        name.removesuffix(".weight"): source.plan(name.removesuffix(".weight"), quant)
        for name in source.names()
        if is_linear(name, source.shape(name))
    }


class Direct:
    """Quantises every layer by itself.

    Args:
        source: the model.
        quant: settled.
        bits: budget, None for T as ``quant`` says.
    """

    def __init__(self, source: ModelSource, quant: QuantConfig, bits: float | None) -> None:
        self._source, self._quant, self._bits = source, quant, bits
        self.notes: list[str] = []

    def prepare(self, work: Path, progress: Progress | None) -> QuantConfig:
        """Choose T under the budget, reading every weight once."""
        if self._bits is None:
            return self._quant
        plans = {n: p for n, p in phase_plans(self._source, self._quant).items() if p.phase}
        shapes = {layer: self._source.shape(f"{layer}.weight") for layer in plans}
        pinned = {n: p.stages for n, p in plans.items() if self._quant.names_stages(n)}
        least = uniform_stages(shapes, pinned, self._quant.scale, self._bits)
        method = "alternating" if self._quant.method == "alternating" else "phase"
        errors = {}
        for done, layer in enumerate(plans):
            if progress is not None:
                progress(f"sensitivity: {layer}", done, len(plans))
            stages = [pinned[layer]] if layer in pinned else range(least, MAX_STAGES + 1)
            weight = self._source.dense(f"{layer}.weight")
            found = weight_errors(weight, stages, self._quant.scale, method)
            more = HEAD_WEIGHT if layer == HEAD else 1
            errors[layer] = {t: more * error for t, error in found.items()}
        self._quant = with_budget(self._source, self._quant, errors, self._bits)
        return self._quant

    def make(self, layer: str, weight: np.ndarray) -> tuple[PhaseTensor, Made]:
        """Quantise a weight."""
        if self._source.makes_codes:
            tensor = self._source.phase(layer, self._quant)
            reason = self._source.plan(layer, self._quant).reason
        else:
            tensor, reason = quantize_layer(weight, layer, self._quant)
        if self._bits is not None:
            reason += f"; T by the budget of {self._bits:g} bits (errors of weights)"
        return tensor, Made(reason, relative_error(weight, tensor))

    def dense(self, name: str, array: np.ndarray) -> np.ndarray:
        """Keep it."""
        return array


class Calibrated:
    """Quantises a model with calibration text; needs PyTorch.

    Args:
        source: the model.
        quant: settled.
        bits: budget, None for T as ``quant`` says.
        calibration: the request.
        windows: its tokens, uint32 (windows, length).
    """

    def __init__(
        self,
        source: ModelSource,
        quant: QuantConfig,
        bits: float | None,
        calibration: Calibration,
        windows: np.ndarray,
    ) -> None:
        self._source, self._quant, self._bits = source, quant, bits
        self._calibration, self._windows = calibration, windows
        self._solutions: Solutions | None = None
        self._losses: Losses = {}
        self._plain: frozenset[str] = frozenset()
        self._tuned: dict[str, PhaseTensor] = {}
        self._gains: dict[str, np.ndarray] = {}
        self.notes: list[str] = []

    def prepare(self, work: Path, progress: Progress | None) -> QuantConfig:
        """Run the model over the text and solve its layers; choose T under the budget."""
        from fairy_compile.calibrate.one_stage import set_aside
        from fairy_compile.calibrate.run import solve_model

        plans = phase_plans(self._source, self._quant).values()
        windows, aside = self._windows, None
        if self._bits is not None or any(plan.phase and plan.stages == 1 for plan in plans):
            windows, aside = set_aside(windows)
        self._solutions, self._losses = solve_model(
            self._source,
            self._quant,
            windows,
            work,
            by_budget=self._bits is not None,
            progress=progress,
        )
        if self._bits is not None:
            self._quant = with_budget(self._source, self._quant, self._losses, self._bits)
        if aside is not None:
            self._choose_scales(aside, work, progress)
        if self._calibration.tune:
            self._tune(progress)
        return self._quant

    def _choose_scales(self, windows: np.ndarray, work: Path, progress: Progress | None) -> None:
        """Keep the rule's scales in one-stage layers where fitted ones do not serve the model."""
        from fairy_compile.calibrate.one_stage import choose_scales
        from fairy_compile.calibrate.run import device
        from fairy_compile.calibrate.skeleton import Skeleton

        stages = {name: self._quant.stages(name) for name in self._solutions.layers()}
        if not any(self._solutions.has_plain(name, t) for name, t in stages.items()):
            return
        done = 0

        def step(words: str) -> None:
            nonlocal done
            if progress is not None:
                progress(f"calibrate: {words}", done, len(skeleton.layers) + 1)
            done += 1

        skeleton = Skeleton(self._source, device())
        choice = choose_scales(skeleton, self._solutions, stages, windows, work, step)
        self._plain = choice.plain
        ones = sum(1 for t in stages.values() if t == 1)
        self.notes.append(
            f"{len(choice.plain)} of {ones} layers with T = 1 keep the scales of the published "
            f"rule: on {windows.size:,} tokens kept aside the quantised model's loss is "
            f"{choice.plain_loss:.3f} nats a token with them, {choice.fitted_loss:.3f} with "
            f"fitted ones, {choice.loss:.3f} as chosen"
        )

    def _tune(self, progress: Progress | None) -> None:
        from fairy_compile.calibrate.run import device
        from fairy_compile.calibrate.tune import tune

        found = self._solutions
        tensors = {
            n: found.tensor(n, self._quant.stages(n), plain=n in self._plain)
            for n in found.layers()
        }
        steps = self._calibration.tune
        tuned = tune(self._source, tensors, self._windows, steps, device(), progress)
        self._tuned, self._gains = tuned.tensors, tuned.dense
        did = "tuned in" if tuned.tensors else "left as they were, for nothing was gained in"
        self.notes.append(
            f"scales and norm gains {did} {steps} steps: divergence from the floating-point model "
            f"on text kept aside {tuned.before:.4f} before, {tuned.after:.4f} after, nats a token"
        )

    def make(self, layer: str, weight: np.ndarray) -> tuple[PhaseTensor, Made]:
        """Return a layer solved before."""
        if layer not in self._solutions.layers():
            # A linear layer that is in the files and not in the model that ran.
            plain = dataclasses.replace(self._quant, method="alternating")
            tensor, reason = quantize_layer(weight, layer, plain)
            reason += "; the calibrated model does not use it"
            return tensor, Made(reason, relative_error(weight, tensor))
        stages = self._quant.stages(layer)
        found = self._solutions.candidates(layer)[stages]
        loss = self._losses.get(layer, {}).get(stages)
        reason = found.reason
        if self._bits is not None:
            reason += f"; T by the budget of {self._bits:g} bits (estimated loss)"
        if (tensor := self._tuned.get(layer)) is not None:
            reason += "; scales tuned"
            return tensor, Made(reason, relative_error(weight, tensor), loss=loss)
        if layer in self._plain:
            tensor = self._solutions.tensor(layer, stages, plain=True)
            return tensor, Made(reason, found.plain_nmse, found.plain_output_error, loss)
        tensor = self._solutions.tensor(layer, stages)
        return tensor, Made(reason, found.nmse, found.output_error, loss)

    def dense(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return the tuned gains of a norm, anything else as it is."""
        return self._gains.get(name, array)


def with_budget(
    source: ModelSource,
    quant: QuantConfig,
    errors: Mapping[str, Mapping[int, float]],
    bits: float,
) -> QuantConfig:
    """Return ``quant`` with T of every layer chosen; see `frontends.budget`."""
    shapes = {layer: source.shape(f"{layer}.weight") for layer in errors}
    chosen = choose_stages(make_groups(shapes, errors, quant.scale), bits)
    return dataclasses.replace(quant, stages_for=chosen | dict(quant.stages_for))


def relative_error(weight: np.ndarray, tensor: PhaseTensor) -> float:
    """Return ||A - A'||² / ||A||² of a weight A and its phase tensor A'.

    Computed on evenly spaced bands of 64 complex rows, 512 at most: all rows of small layers.

    Args:
        weight: (2n, 2m), any float dtype.
        tensor: phase tensor of the same shape.
    """
    starts = range(0, tensor.n, _BAND)
    lost = total = 0.0
    for first in starts[:: -(-len(starts) // _MAX_BANDS)]:
        rows = np.arange(first, min(first + _BAND, tensor.n))
        scales = tensor.scales
        if tensor.scale == "row":
            scales = scales[..., rows, :]
        elif tensor.scale == "tile64":
            scales = scales[..., first // _BAND : first // _BAND + 1, :]
        band = dataclasses.replace(
            tensor, codes=tensor.codes[:, :, rows], scales=scales, n=len(rows)
        )
        exact = weight[np.concatenate([rows, tensor.n + rows])].astype(np.float32)
        lost += float(np.square(exact - band.dequantize()).sum(dtype=np.float64))
        total += float(np.square(exact).sum(dtype=np.float64))
    return lost / total if total else 0.0
