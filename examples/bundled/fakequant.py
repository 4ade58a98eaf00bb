"""Fake quantisation for training: the Fairy2i phase rule with straight-through gradients.

Every linear layer computes with its quantised weight while the optimiser moves the real weight
behind it, the latent. Because the widely-linear form is a linear change of coordinates, passing the
gradient through U and W unchanged is the same as passing it to the real weight unchanged. The
packed codes are made from the latents at the end; quantising a quantised weight again would change
it, because the rule is not idempotent.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

STAGES, HEAD_STAGES = 2, 3  # lm_head is the most sensitive layer; a third stage there is cheap


def phase_stage(w: torch.Tensor) -> torch.Tensor:
    """Quantise a complex matrix once: the nearest phase among 1, i, -1, -i, times a scale.

    Each sector is closed on its clockwise side, as with angle(w) against odd multiples of pi/4,
    and zero counts as phase 1. One scale serves both real phases, one both imaginary ones.
    """
    re, im = w.real, w.imag
    imaginary = ((im >= re) & (im > -re)) | ((im <= re) & (im < -re))
    n_imaginary = imaginary.sum()
    n_real = imaginary.numel() - n_imaginary
    s_re = ((re.abs() * ~imaginary).sum() / n_real.clamp(min=1)).clamp(min=1e-6)
    s_im = ((im.abs() * imaginary).sum() / n_imaginary.clamp(min=1)).clamp(min=1e-6)
    return torch.complex(
        torch.where(re < 0, -s_re, s_re) * ~imaginary, torch.where(im < 0, -s_im, s_im) * imaginary
    )


def phase_quantise(w: torch.Tensor, stages: int) -> torch.Tensor:
    """Quantise a complex matrix in residual stages: each one takes what the last one left."""
    total = torch.zeros_like(w)
    for _ in range(stages):
        total = total + phase_stage(w - total)
    return total


def fairy_quantise(a: torch.Tensor, stages: int) -> torch.Tensor:
    """Apply the rule to a real weight: y = A x is U z + W conj(z) with z = x_1 + i x_2."""
    rows, cols = a.shape[0] // 2, a.shape[1] // 2
    (a11, a12), (a21, a22) = (half.split(cols, dim=1) for half in a.split(rows))
    u = phase_quantise(torch.complex(a11 + a22, a21 - a12) / 2, stages)
    w = phase_quantise(torch.complex(a11 - a22, a12 + a21) / 2, stages)
    top = torch.cat([u.real + w.real, w.imag - u.imag], dim=1)
    return torch.cat([top, torch.cat([u.imag + w.imag, u.real - w.real], dim=1)])


class StraightThrough(torch.autograd.Function):
    """Quantise in the forward pass, pass the gradient on unchanged in the backward pass."""

    @staticmethod
    def forward(ctx: object, latent: torch.Tensor, stages: int) -> torch.Tensor:
        """Return the quantised weight."""
        return fairy_quantise(latent, stages)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the latent's gradient, and none for the number of stages."""
        return gradient, None


class FakeQuant(nn.Module):
    """Parametrisation of a linear layer's weight; the real weight stays the trained latent."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the weight the layer computes with."""
        return StraightThrough.apply(latent, self.stages)


def stages_of(name: str) -> int:
    """Return the number of residual stages of the linear layer `name`."""
    return HEAD_STAGES if name == "lm_head" else STAGES


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def fake_quantise(model: nn.Module) -> None:
    """Make every linear layer of the model compute with its quantised weight."""
    for name, layer in linears(model).items():
        parametrize.register_parametrization(layer, "weight", FakeQuant(stages_of(name)))


def latents(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict with the latent weights under their ordinary names."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[name.replace("parametrizations.weight.original", "weight")] = tensor
    return state
