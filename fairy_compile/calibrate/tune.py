"""Tuning scales and norm gains of the whole model, with its codes frozen.

Layers were solved one by one. Here the quantised model as a whole is brought nearer to the
floating-point one: its distribution over next tokens is distilled on the calibration text, and only
the scales and the gains of the norms move. Both models are held in memory, so this is for small
ones. A part of the windows is kept aside; where the tuned model is not better on it, nothing
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fairy_compile.artifact.files import human_bytes
from fairy_compile.bench.machine import memory_bytes
from fairy_compile.calibrate.refit import ScaleMap
from fairy_compile.errors import FairyError
from fairy_compile.evaluation.torch_model import source_model
from fairy_compile.frontends.source import ModelSource
from fairy_compile.phase import FAIRY2I_MIN_SCALE, PhaseTensor
from fairy_compile.train.models import quiet_transformers

# Steps are relative: scales are tuned through their logarithms, gains are near 1.
_RATE = 5e-3
_BATCH_TOKENS = 2048
_HELD = 8  # one window of so many is kept aside
# Two models in float32, the dequantised weights with their gradients, and the signs of codes.
_BYTES_PER_WEIGHT = 24


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        tensors: layer -> codes as before, with other scales.
        dense: tensor name -> norm gains, float32.
        before: mean KL divergence from the floating-point model on the windows kept aside, nats a
            token.
        after: the same after tuning; where it is not less, ``tensors`` and ``dense`` are empty.
    """

    tensors: dict[str, PhaseTensor]
    dense: dict[str, np.ndarray]
    before: float
    after: float


class _Layer(nn.Module):
    """A linear layer of frozen codes whose scales are parameters."""

    def __init__(self, linear: nn.Linear, tensor: PhaseTensor) -> None:
        super().__init__()
        device = linear.weight.device
        self.tensor, self.bias = tensor, linear.bias
        self._map = ScaleMap(tensor, torch.arange(tensor.n, device=device))
        scales = torch.from_numpy(tensor.scales.astype(np.float32)).to(device)
        self.log_scales = nn.Parameter(scales.log())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the dequantised layer."""
        return functional.linear(x, self._map.dense(self.log_scales.exp()), self.bias)

    def tuned(self) -> PhaseTensor:
        """Return the layer with its scales as they are now."""
        scales = self.log_scales.detach().exp().clamp(min=FAIRY2I_MIN_SCALE)
        return replace(self.tensor, scales=scales.cpu().numpy())


def check_memory(source: ModelSource) -> None:
    """Raise `FairyError` where both models do not fit into memory."""
    weights = sum(int(np.prod(source.shape(name))) for name in source.names())
    needed, there = _BYTES_PER_WEIGHT * weights, memory_bytes()
    if there and needed > there:
        raise FairyError(
            f"--tune holds the model and its floating-point form in memory, about "
            f"{human_bytes(needed)}, and this machine has {human_bytes(there)}; leave --tune out"
        )


def tune(
    source: ModelSource,
    tensors: Mapping[str, PhaseTensor],
    windows: np.ndarray,
    steps: int,
    device: torch.device,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Tune scales and norm gains by distillation.

    Args:
        source: the floating-point model.
        tensors: layer -> codes and scales to begin with.
        windows: uint32 (windows, length).
        steps: optimiser steps.
        device: where to compute.
        progress: called before every step.

    Raises:
        FairyError: there is a single window, or the models do not fit into memory.
    """
    check_memory(source)
    if len(windows) < 2:
        raise FairyError(
            "--tune needs two windows of calibration text or more, one to check with; give more "
            "--calibrate-tokens, or a smaller --calibrate-window"
        )
    with quiet_transformers():
        teacher, student = (source_model(source).eval().to(device) for _ in range(2))
    teacher.requires_grad_(False)
    student.requires_grad_(False)
    layers = {}
    for name, tensor in tensors.items():
        parent, _, last = name.rpartition(".")
        layers[name] = _Layer(student.get_submodule(name), tensor)
        setattr(student.get_submodule(parent), last, layers[name])
    gains = {
        name: parameter.requires_grad_()
        for name, parameter in student.named_parameters()
        if parameter.ndim == 1 and name.endswith("norm.weight")
    }
    parameters = [*(layer.log_scales for layer in layers.values()), *gains.values()]
    # Evenly spread, and of one window the last.
    held = np.arange(len(windows)) % min(_HELD, len(windows)) == min(_HELD, len(windows)) - 1
    before = _divergence(teacher, student, windows[held], device)
    _optimise(teacher, student, parameters, windows[~held], steps, device, progress)
    after = _divergence(teacher, student, windows[held], device)
    if not after < before:
        return Tuned({}, {}, before, after)
    return Tuned(
        {name: layer.tuned() for name, layer in layers.items()},
        {name: gain.detach().cpu().numpy() for name, gain in gains.items()},
        before,
        after,
    )


def _optimise(
    teacher: nn.Module,
    student: nn.Module,
    parameters: list[nn.Parameter],
    windows: np.ndarray,
    steps: int,
    device: torch.device,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    optimiser = torch.optim.Adam(parameters, lr=_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = np.random.default_rng(0)
    size = min(len(windows), max(1, _BATCH_TOKENS // windows.shape[1]))
    for done in range(steps):
        if progress is not None:
            progress("tune scales and norm gains", done, steps)
        batch = windows[order.choice(len(windows), size, replace=False)]
        optimiser.zero_grad()
        _kl(teacher, student, batch, device).backward()
        optimiser.step()
        schedule.step()


def _kl(
    teacher: nn.Module, student: nn.Module, windows: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Return the mean KL(teacher || student) over tokens, nats."""
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
    with torch.no_grad():
        want = functional.log_softmax(teacher(tokens, use_cache=False).logits, -1)
    got = functional.log_softmax(student(tokens, use_cache=False).logits, -1)
    return functional.kl_div(got, want, reduction="none", log_target=True).sum(-1).mean()


@torch.no_grad()
def _divergence(
    teacher: nn.Module, student: nn.Module, windows: np.ndarray, device: torch.device
) -> float:
    parts = [float(_kl(teacher, student, windows[i : i + 1], device)) for i in range(len(windows))]
    return sum(parts) / len(parts)
