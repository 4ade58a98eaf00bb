"""Models and training runs of the quality study."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import WINDOW, Epochs, held_out, tokenizer
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import fairy_compile as fc
from fairy_compile.qat import frozen

BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """How one run trains.

    Attributes:
        tokens: how many, rounded up to whole batches of BATCH x WINDOW.
        peak: learning rate after warm-up; a cosine then takes it down to 2 %.
        warmup: steps.
        decay: AdamW's weight decay.
    """

    tokens: int
    peak: float
    warmup: int
    decay: float

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.tokens / (BATCH * WINDOW))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.peak * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


def new_model(hidden: int, vocab: int, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of four layers, heads and a head of its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        weight: torch.Tensor,
        rule: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return rule(weight)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return grad, None


def sign_rule(weight: torch.Tensor) -> torch.Tensor:
    """1 bit: sign times the mean magnitude of the matrix (BitNet's and XNOR-Net's rule)."""
    return torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean()


def ternary_rule(weight: torch.Tensor) -> torch.Tensor:
    """1.58 bits: rounded to {-1, 0, 1} times the mean magnitude (BitNet b1.58, "absmean")."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1) * scale


def group_rule(bits: int, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Round to nearest with a minimum and a step for every ``group`` weights of a row."""

    def rule(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.reshape(weight.shape[0], -1, group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
        return (((grouped - low) / step).round() * step + low).reshape(weight.shape)

    return rule


class PeerLinear(nn.Linear):
    """A linear layer trained straight-through under the rule of a peer."""

    rule: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x A'^T."""
        return functional.linear(x, _StraightThrough.apply(self.weight, self.rule), self.bias)


def apply_peer(model: nn.Module, rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make every linear layer of a model one of a peer, in place."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PeerLinear
            layer.rule = staticmethod(rule)


@torch.no_grad()
def evaluate(model: nn.Module, windows: torch.Tensor) -> float:
    """Return the mean cross-entropy on held-out windows, nats a token, in float32."""
    training = model.training
    model.eval()
    total = 0.0
    with frozen(model):
        for rows in windows.split(16):
            logits = model(rows, use_cache=False).logits[:, :-1]
            total += functional.cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
    model.train(training)
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def train(
    model: LlamaForCausalLM, work: Path, recipe: Recipe, seed: int, log: Path, compiled: bool
) -> float:
    """Train in bf16 autocast and return the loss on held-out text; ``log`` gets a line a check."""
    windows, epochs = held_out(work), Epochs(work, BATCH, seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), recipe.peak, betas=(0.9, 0.95), weight_decay=recipe.decay, fused=True
    )

    def batch_loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1], use_cache=False).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    step_loss = torch.compile(batch_loss) if compiled else batch_loss
    begun = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss(next(epochs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            line = {
                "step": step + 1,
                "tokens": (step + 1) * BATCH * WINDOW,
                "batch_loss": loss.item(),
                "held_out": evaluate(model, windows),
                "seconds": time.monotonic() - begun,
            }
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
    return evaluate(model, windows)


def save(model: LlamaForCausalLM, work: Path, directory: Path) -> None:
    """Write an ordinary Hugging Face directory."""
    model.save_pretrained(directory)
    tokenizer(work).save_pretrained(directory)


def prepare_phase(model: LlamaForCausalLM, quant: str, stages_for: dict[str, int]) -> None:
    """Put phase layers in place of the linear ones."""
    fc.qat.prepare(model, fc.QuantConfig(quant, stages_for=stages_for))
