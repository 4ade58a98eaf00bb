"""Models and training runs of the quality study."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import WINDOW, Epochs, tokenizer
from graph import GraphSteps
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
        tokens: how many, rounded up to whole batches of ``batch`` x WINDOW.
        peak: learning rate after warm-up; a cosine then takes it down to 2 %.
        warmup: steps.
        decay: AdamW's weight decay.
        batch: windows a step.
        distil: share of the loss that is the divergence from the floating-point model.
        others: factor on the learning rate of what is no linear layer (embedding, norms).
    """

    tokens: int
    peak: float
    warmup: int
    decay: float
    batch: int = BATCH
    distil: float = 0.0
    others: float = 1.0

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.tokens / (self.batch * WINDOW))

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
    total = torch.zeros((), dtype=torch.float64, device=windows.device)
    with frozen(model):
        for rows in windows.split(16):
            logits = model(rows, use_cache=False).logits[:, :-1]
            total += functional.cross_entropy(
                logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            )
    model.train(training)
    return total.item() / (windows.shape[0] * (windows.shape[1] - 1))


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Return AdamW's groups; "factor" is that on the learning rate."""
    if recipe.others == 1.0:
        return [{"params": list(model.parameters()), "factor": 1.0}]
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    sides: tuple[list, list] = ([], [])
    for parameter in model.parameters():
        sides[id(parameter) not in linear].append(parameter)
    factors = (1.0, recipe.others)
    return [{"params": p, "factor": f} for p, f in zip(sides, factors, strict=True)]


class BatchLoss:
    """The loss of a batch, int64 (batch, WINDOW + 1), under bf16 autocast.

    Args:
        model: the one that learns.
        distil: share of KL(teacher || model) in the loss.
        teacher: floating-point model, on the same device; used where ``distil`` is not 0.
    """

    def __init__(self, model: nn.Module, distil: float, teacher: nn.Module | None) -> None:
        if distil and teacher is None:
            raise ValueError("distillation needs a teacher")
        self.model, self.distil, self.teacher = model, distil, teacher

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean, nats a token."""
        inputs, labels = batch[:, :-1], batch[:, 1:].flatten()
        with torch.autocast(batch.device.type, torch.bfloat16):
            logits = self.model(inputs, use_cache=False).logits.float().flatten(0, 1)
            loss = functional.cross_entropy(logits, labels)
            if not self.distil:
                return loss
            with torch.no_grad():
                target = self.teacher(inputs, use_cache=False).logits.float().flatten(0, 1)
            got, want = functional.log_softmax(logits, -1), functional.log_softmax(target, -1)
            divergence = functional.kl_div(got, want, reduction="batchmean", log_target=True)
            return (1 - self.distil) * loss + self.distil * divergence


def train(
    model: LlamaForCausalLM,
    work: Path,
    recipe: Recipe,
    seed: int,
    log: Path,
    *,
    windows: torch.Tensor,
    device: str = "cpu",
    teacher: LlamaForCausalLM | None = None,
    compiled: bool = False,
    checks: int = 200,
    captured: bool = True,
) -> Iterator[float]:
    """Train in bf16 autocast where the model is, and yield the share done now and then.

    Args:
        model: trained in place.
        work: has the token streams.
        recipe: how.
        seed: order of the text.
        log: gets a line every ``checks`` steps, with the loss on held-out text.
        windows: held-out text, where the model is.
        device: where that is.
        teacher: see `BatchLoss`.
        compiled: on the CPU, torch.compile the loss.
        checks: see ``log``.
        captured: on CUDA, whether a step is a graph.
    """
    batch_loss = BatchLoss(model, recipe.distil, teacher)
    model.train()
    if device != "cpu":
        groups = parameter_groups(model, recipe)
        stepper: Steps | GraphSteps = GraphSteps(
            model, work, recipe, seed, batch_loss, groups, captured=captured
        )
    else:
        loss = torch.compile(batch_loss) if compiled else batch_loss
        stepper = Steps(model, work, recipe, seed, loss)
    begun = time.monotonic()
    for step in range(recipe.steps):
        stepper.step()
        done = step + 1
        if done % stepper.chunk == 0:
            yield done / recipe.steps
        if done % checks == 0 or done == recipe.steps:
            line = {
                "step": done,
                "tokens": done * recipe.batch * WINDOW,
                "batch_loss": stepper.last_loss(),
                "held_out": evaluate(model, windows),
                "seconds": time.monotonic() - begun,
            }
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
    stepper.close()


class Steps:
    """Optimiser steps, one call after the other: for the CPU."""

    chunk = 10

    def __init__(
        self,
        model: nn.Module,
        work: Path,
        recipe: Recipe,
        seed: int,
        loss: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.model, self.recipe, self.loss = model, recipe, loss
        self.epochs = Epochs(work, recipe.batch, seed)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(model, recipe),
            recipe.peak,
            betas=(0.9, 0.95),
            weight_decay=recipe.decay,
            fused=True,
        )
        self.done = 0
        self._last = torch.zeros(())

    def step(self) -> None:
        """Do one."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(self.done) * group["factor"]
        self._last = self.loss(next(self.epochs))
        self._last.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1

    def last_loss(self) -> float:
        """Return the training loss of the last step."""
        return self._last.item()

    def close(self) -> None:
        """Nothing is held."""


@torch.no_grad()
def round_to_bfloat16(model: nn.Module) -> None:
    """Round the weights, as checkpoints are stored; they stay float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def save(model: LlamaForCausalLM, corpus: Path, directory: Path, *, half: bool = False) -> None:
    """Write an ordinary Hugging Face directory; ``half`` stores bfloat16."""
    state = {name: t.bfloat16() for name, t in model.state_dict().items()} if half else None
    model.save_pretrained(directory, state_dict=state)
    tokenizer(corpus).save_pretrained(directory)


def prepare_phase(
    model: LlamaForCausalLM, quant: str, stages_for: dict[str, int], **others: object
) -> None:
    """Put phase layers in place of the linear ones; ``others`` goes to `fc.QuantConfig`."""
    fc.qat.prepare(model, fc.QuantConfig(quant, stages_for=stages_for, **others))
