"""The layers that quantisation-aware training puts in place of linear ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from fairy_compile.config import Granularity
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.phase import PhaseTensor, quantize, quantize_complex_layer
from fairy_compile.phase.quantize import FAIRY2I_MIN_SCALE, IFAIRY_MIN_SCALE
from fairy_compile.qat.experts import frozen_experts
from fairy_compile.qat.rule import (
    int8_activations,
    quantized_complex_weight,
    quantized_weight,
)


class PhaseLinear(nn.Linear):
    """A linear layer y = A' x + b, A' being the phase-quantised value of its latent weight A.

    The latent is the *real* weight. The straight-through gradients of the widely-linear pair U, W
    are then exactly dL/dA = dL/dA' (see `qat.rule`), so any optimiser sees the ordinary problem;
    with U and W as parameters Adam would scale its steps differently. Parameters and state-dict
    names are those of `nn.Linear`, so checkpoints load into either.

    Attributes:
        weight: latent A, (2n, 2m), float32, bfloat16 or float16; codes are made in float32.
        stages: T.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        stages: int = 2,
        scale: Granularity = "tensor",
        min_scale: float = FAIRY2I_MIN_SCALE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features % 2 or out_features % 2:
            raise FairyError(
                f"a phase layer of {in_features} inputs and {out_features} outputs is not "
                "possible; both must be even"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.stages, self.scale, self.min_scale = stages, scale, min_scale
        self._frozen: torch.Tensor | None = None

    @classmethod
    def of(cls, linear: nn.Linear, stages: int, scale: Granularity) -> PhaseLinear:
        """Return a phase layer that shares the parameters of ``linear``."""
        biased = linear.bias is not None
        sizes = (linear.in_features, linear.out_features, biased)
        layer = cls(*sizes, stages=stages, scale=scale, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def quantized_weight(self) -> torch.Tensor:
        """Return A', (2n, 2m) in the dtype of the latent, with its straight-through gradient."""
        return quantized_weight(self.weight, self.stages, self.scale, self.min_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x A'^T + b: (..., 2m) -> (..., 2n)."""
        weight = self._frozen if self._frozen is not None else self.quantized_weight()
        return functional.linear(x, weight, self.bias)

    def phase_tensor(self, weight: torch.Tensor | None = None, name: str = "weight") -> PhaseTensor:
        """Return codes and scales of the latent, by the NumPy rule that `build` uses.

        Args:
            weight: the whole latent where the layer itself holds a shard of it.
            name: how errors call the weight.

        Raises:
            FairyError: the latent holds a NaN or infinity.
        """
        latent = self.weight if weight is None else weight
        return quantize(latent, self.stages, scale=self.scale, min_scale=self.min_scale, name=name)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{super().extra_repr()}, stages={self.stages}, scale={self.scale}"


class ComplexLinear(nn.Module):
    """A natively complex linear layer y = w conj(x) (iFairy, arXiv 2508.05571).

    Inputs and outputs hold [re, im] side by side in the last dimension:

        y_re = w_re x_re + w_im x_im        y_im = w_im x_re - w_re x_im

    Attributes:
        weight_real: (n, m).
        weight_imag: (n, m).
        int8_inputs: round inputs to int8, one scale for each token's real and one for its
            imaginary parts, as iFairy does where weights are phase codes.
    """

    int8_inputs = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.weight_real = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.weight_imag = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        for part in (self.weight_real, self.weight_imag):
            nn.init.normal_(part, std=(2 * in_features) ** -0.5)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (re, im) of the matrix to multiply with, each (n, m)."""
        return self.weight_real, self.weight_imag

    def inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (re, im) of (..., 2m), rounded if ``int8_inputs``."""
        re, im = x[..., : self.in_features], x[..., self.in_features :]
        return (int8_activations(re), int8_activations(im)) if self.int8_inputs else (re, im)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., 2n) for (..., 2m)."""
        (x_re, x_im), (w_re, w_im) = self.inputs(x), self.weights()
        y_re = functional.linear(x_re, w_re) + functional.linear(x_im, w_im)
        y_im = functional.linear(x_re, w_im) - functional.linear(x_im, w_re)
        return torch.cat([y_re, y_im], dim=-1)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def complex_to_real(re: torch.Tensor, im: torch.Tensor) -> torch.Tensor:
    """Return the real matrix (2n, 2m) of a complex layer y = w conj(x) on [re, im]."""
    return torch.cat([torch.cat([re, im], dim=1), torch.cat([im, -re], dim=1)])


def real_to_complex(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `complex_to_real`: (2n, 2m) -> (re, im), each (n, m)."""
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    return weight[:n, :m].contiguous(), weight[:n, m:].contiguous()


class PhaseComplexLinear(ComplexLinear):
    """A `ComplexLinear` that multiplies with the phase-quantised value of its latent weight.

    Attributes:
        stages: T, 1 in iFairy.
        scale: granularity of the scales.
        min_scale: lower clamp of every scale, 1e-5 in iFairy.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stages: int = 1,
        scale: Granularity = "tensor",
        int8_inputs: bool = False,
        min_scale: float = IFAIRY_MIN_SCALE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.stages, self.scale, self.min_scale = stages, scale, min_scale
        self.int8_inputs = int8_inputs
        self._frozen: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(
        cls, linear: ComplexLinear, stages: int, scale: Granularity, int8_inputs: bool = False
    ) -> PhaseComplexLinear:
        """Return a phase layer that shares the parameters of ``linear``."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            stages=stages,
            scale=scale,
            int8_inputs=int8_inputs,
            device="meta",
        )
        layer.weight_real, layer.weight_imag = linear.weight_real, linear.weight_imag
        return layer.train(linear.training)

    def quantized_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the quantised (re, im), each (n, m), with straight-through gradients."""
        return quantized_complex_weight(
            self.weight_real, self.weight_imag, self.stages, self.scale, self.min_scale
        )

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (re, im) of the quantised matrix."""
        return self._frozen if self._frozen is not None else self.quantized_weight()

    def phase_tensor(
        self,
        weight: tuple[torch.Tensor, torch.Tensor] | None = None,
        name: str = "weight",
    ) -> PhaseTensor:
        """Return codes and scales of the latent by the NumPy rule; see `PhaseLinear`."""
        re, im = (self.weight_real, self.weight_imag) if weight is None else weight
        return quantize_complex_layer(
            re, im, self.stages, scale=self.scale, min_scale=self.min_scale
        )

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"{super().extra_repr()}, stages={self.stages}, scale={self.scale}"


PhaseLayer = PhaseLinear | PhaseComplexLinear


def phase_layers(model: nn.Module) -> dict[str, PhaseLayer]:
    """Return name -> layer of every phase layer of a model."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, PhaseLinear | PhaseComplexLinear)
    }


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in all places of a model that hold ``old``; a layer may be used in several."""
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def refuse_experts(model: nn.Module, what: str) -> None:
    """Refuse models that hold the weights of experts as one parameter of three dimensions.

    They are no linear layers, so they would stay as they are: most of such a model.

    Args:
        model: any module.
        what: what is not possible with such parameters, and what to do instead.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != "experts":
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                raise UnsupportedError(
                    f"{name}.{own} holds the weights of {len(parameter)} experts in one parameter, "
                    f"which {what}"
                )


def plain_name(name: str) -> str:
    """Drop what torch.compile and FSDP put into the names of wrapped modules."""
    parts = (p for p in name.split(".") if p not in ("_orig_mod", "_fsdp_wrapped_module"))
    return ".".join(parts)


@contextmanager
def stacked(model: nn.Module) -> Iterator[None]:
    """Quantise the weights of equal layers in one go, for one forward pass in the block.

    Real phase layers of the same shape, dtype, device, T and granularity are stacked and go through
    the rule together. Values are those without it, and gradients reach the latents as usual. Where
    layers are so small that a GPU waits for kernels to start, this saves most of the rule's time;
    it takes memory for the stacked latents and for all quantised weights at once.
    """
    groups: dict[tuple, list[PhaseLinear]] = {}
    for layer in phase_layers(model).values():
        if isinstance(layer, PhaseLinear):
            weight = layer.weight
            key = (weight.shape, weight.dtype, weight.device)
            key += (layer.stages, layer.scale, layer.min_scale)
            groups.setdefault(key, []).append(layer)
    try:
        for (*_, stages, scale, least), layers in groups.items():
            latents = torch.stack([layer.weight for layer in layers])
            values = quantized_weight(latents, stages, scale, least).unbind()
            for layer, value in zip(layers, values, strict=True):
                layer._frozen = value
        yield
    finally:
        for layers in groups.values():
            for layer in layers:
                layer._frozen = None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Compute every quantised weight once for the whole block: for evaluation and generation.

    Inside, weights must not change and no gradients reach them.
    """
    layers = list(phase_layers(model).values())
    try:
        with torch.no_grad():
            for layer in layers:
                layer._frozen = layer.quantized_weight()
        with frozen_experts(model):
            yield
    finally:
        for layer in layers:
            layer._frozen = None
