"""The transformers Trainer with the phase rule's needs: autocast around float32 latents,
distillation, the schedule, and a stop at the first gradient that is not finite.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.qat.experts import find_experts
from fairy_compile.qat.export import mark_latents
from fairy_compile.qat.layers import frozen
from fairy_compile.train.checkpoint import PREFIX, mark_complete, reading
from fairy_compile.train.config import TrainConfig
from fairy_compile.train.models import load_model
from fairy_compile.train.schedule import lr_factor, weight_decay


class Diverged(FairyError):
    """A loss, gradient or weight is no finite number any more."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        steps: of the whole run.
        loss: mean training loss since the last report, None if there was none.
        eval_loss: of an evaluation just done, else None.
        tokens_per_second: since this process began to train, evaluations included.
        seconds_left: at that speed.
    """

    step: int
    steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float
    seconds_left: float


class QatTrainer(Trainer):
    """Trains a prepared model on blocks of tokens.

    Args:
        settings: of the run.
        quant: what checkpoints are marked with.
        autocast: compute in bfloat16. The Trainer's own mixed precision stays off: under FSDP it
            would gather weights in bfloat16, and codes would be made of rounded latents.
        teacher: full-precision model to distil from, or None.
        kwargs: the Trainer's.
    """

    def __init__(
        self,
        settings: TrainConfig,
        quant: QuantConfig,
        *,
        autocast: bool,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings, self.quant, self.autocast = settings, quant, autocast
        self.teacher = None if teacher is None else teacher.to(self.args.device)
        # compute_loss returns the mean of a micro-step; blocks are equally long.
        self.model_accepts_loss_kwargs = False
        self.last_loss = math.nan

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the run's schedule; see `fairy_compile.train.schedule`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: lr_factor(step, num_training_steps, self.settings),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean loss, nats a token: cross-entropy, mixed with distillation."""
        tokens = inputs["input_ids"]
        with self._autocast():
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = _cross_entropy(logits, tokens)
        if model.training:
            self.last_loss = loss.detach()
            if self.teacher is not None:
                loss = self._distilled(loss, logits, tokens)
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast)

    def _distilled(
        self, loss: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Mix in KL(teacher || student) at the temperature, scaled by its square."""
        share, temperature = self.settings.distill, self.settings.temperature
        with torch.no_grad(), self._autocast():
            target = self.teacher(input_ids=tokens, use_cache=False).logits
        student = functional.log_softmax(logits[:, :-1].float() / temperature, -1)
        teacher = functional.log_softmax(target[:, :-1].float() / temperature, -1)
        divergence = functional.kl_div(student, teacher, reduction="none", log_target=True)
        divergence = divergence.sum(-1).mean() * temperature**2
        return (1 - share) * loss + share * divergence

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss of a batch."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with every weight quantised once."""
        with contextlib.nullcontext() if self.is_fsdp_enabled else frozen(self.model):
            return super().evaluate(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip, and stop before a step that would spoil the weights.

        The norm is that of all processes, so all of them stop.
        """
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            raise Diverged(
                f"training diverged at step {self.state.global_step + 1}: the loss is "
                f"{float(self.last_loss):.4g} and the norm of the gradient {float(norm):.4g}"
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, parameter in model.named_parameters():
            local = getattr(parameter, "_local_tensor", parameter)  # a shard under FSDP
            if local.numel() and not bool(torch.isfinite(local).all()):
                raise Diverged(
                    f"training diverged by step {self.state.global_step}: {name} holds values that "
                    "are not finite"
                )
        super()._save_checkpoint(model, trial)
        # A kill may leave a checkpoint half written: only marked ones are resumed from.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights; those of experts have other names and shapes in checkpoints."""
        with reading(Path(resume_from_checkpoint)):
            if not find_experts(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            weights = load_model(Path(resume_from_checkpoint)).state_dict()
            (self.model if model is None else model).load_state_dict(weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of the optimiser and of its schedule."""
        with reading(Path(checkpoint)) if checkpoint else contextlib.nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random numbers' state."""
        with reading(Path(checkpoint)) if checkpoint else contextlib.nullcontext():
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, marked as master weights so that `build` reads a checkpoint right."""
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            mark_latents(directory, self.quant)


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    predicted = logits[:, :-1].float()
    return functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())


class WeightDecay(TrainerCallback):
    """Sets the weight decay of every step."""

    def __init__(self, settings: TrainConfig):
        self.settings = settings

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Set it where the schedule changes it; norms and biases have none throughout."""
        if self.settings.schedule == "two-stage" and self.settings.weight_decay:
            value = weight_decay(state.global_step, state.max_steps, self.settings)
            for group in optimizer.param_groups:
                if group["weight_decay"] and not value:
                    group["weight_decay"] = 0.0


class Report(TrainerCallback):
    """Hands rows of metrics and progress to the process that shows them.

    Args:
        tokens_per_step: of all processes.
        row: called with a row of `metrics.COLUMNS`.
        progress: called with a `Progress`.
        clock: seconds, monotonic.
        seconds: training time before this process.
    """

    def __init__(
        self,
        tokens_per_step: int,
        row: Callable[[dict[str, Any]], None],
        progress: Callable[[Progress], None] | None,
        clock: Callable[[], float],
        seconds: float,
    ):
        self.tokens_per_step, self.row, self.progress = tokens_per_step, row, progress
        self.clock, self.before = clock, seconds
        self.start = clock()
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start, self.first_step = self.clock(), state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Write what the Trainer logs: training losses, and evaluations."""
        logs = logs or {}
        loss, evaluated = logs.get("loss"), logs.get("eval_loss")
        if not state.is_world_process_zero or (loss is None and evaluated is None):
            return
        seconds = self.clock() - self.start
        done = state.global_step - self.first_step
        speed = self.tokens_per_step * done / seconds if seconds > 0 else 0.0
        self.row(
            {
                "step": state.global_step,
                "tokens": state.global_step * self.tokens_per_step,
                "loss": loss,
                "eval_loss": evaluated,
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_second": speed,
                "seconds": self.before + seconds,
            }
        )
        if self.progress is not None:
            left = (state.max_steps - state.global_step) * seconds / done if done else math.nan
            self.progress(
                Progress(state.global_step, state.max_steps, loss, evaluated, speed, left)
            )
