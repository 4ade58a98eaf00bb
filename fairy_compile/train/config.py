"""`TrainConfig`: everything that decides the outcome of a training run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fairy_compile.config import QuantConfig, check_choice
from fairy_compile.errors import FairyError
from fairy_compile.paths import as_path

SCHEDULES = ("wsd", "two-stage", "cosine", "constant")
PRECISIONS = ("auto", "bf16", "float32")


@dataclass(frozen=True)
class TrainConfig:
    """A training run, as the command line gives it.

    Attributes:
        model: directory or hub id of a real-valued checkpoint, or with ``scratch`` a directory
            with config.json.
        data: text, jsonl, parquet file, directory of them, or a saved Hugging Face dataset.
        output: the checkpoint to make; unfinished work lies in ``<output>.run``.
        quant: the quantisation trained for.
        scratch: start from random weights.
        tokenizer: directory with tokenizer files; None for the model's.
        eval_data: like ``data``, for evaluation; None holds out ``eval_share`` of ``data``.
        eval_share: share of the blocks held out, evenly spread; 0 for no evaluation.
        text_field: column or key of the text in jsonl, parquet and datasets.
        block: tokens a sequence; texts are joined and cut into such blocks. None for the model's
            context, 1024 at most.
        batch: sequences a device and micro-step.
        accumulate: micro-steps an optimiser step.
        steps: optimiser steps; None goes by ``epochs``.
        epochs: passes over the data where ``steps`` is None.
        lr: peak learning rate.
        schedule: see `fairy_compile.train.schedule`.
        warmup: share of the steps that warm up.
        decay: share of the steps at the end in which ``wsd`` decays.
        lr_end: last learning rate as a share of the peak.
        weight_decay: AdamW's; ``two-stage`` drops it to 0 in its second half.
        max_grad_norm: gradients are clipped to this norm.
        distill: weight of the distillation loss against a full-precision teacher, 0 to 1. Training
            losses are those of the mixture, evaluations are cross-entropy alone.
        teacher: directory or hub id of the teacher; None for the model itself, unquantised.
        temperature: of the distillation.
        precision: ``bf16`` computes in bfloat16 by autocast (weights and codes stay float32);
            ``auto`` does so where the device is a GPU that can.
        checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the model with torch.compile.
        fsdp: shard weights and optimiser over all processes.
        cpu: train on the CPU even where there is a GPU.
        seed: of weights, data order and dropout.
        log_every: steps between rows of metrics.
        eval_every: steps between evaluations; None for ten a run.
        save_every: steps between checkpoints; None for ten a run; rounded up to ``log_every``.

    Raises:
        FairyError: a value is outside what is allowed.
    """

    model: str
    data: str
    output: str
    quant: QuantConfig = field(default_factory=QuantConfig)
    scratch: bool = False
    tokenizer: str | None = None
    eval_data: str | None = None
    eval_share: float = 0.01
    text_field: str = "text"
    block: int | None = None
    batch: int = 8
    accumulate: int = 1
    steps: int | None = None
    epochs: float = 1.0
    lr: float = 1e-4
    schedule: Literal["wsd", "two-stage", "cosine", "constant"] = "wsd"
    warmup: float = 0.05
    decay: float = 0.2
    lr_end: float = 0.02
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    distill: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0
    precision: str = "auto"
    checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    cpu: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        check_choice("--schedule", self.schedule, SCHEDULES)
        check_choice("--precision", self.precision, PRECISIONS)
        for name, lowest in (
            ("block", 2),
            ("batch", 1),
            ("accumulate", 1),
            ("steps", 1),
            ("log_every", 1),
            ("eval_every", 1),
            ("save_every", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise FairyError(f"--{_option(name)} is {value}; allowed: {lowest} or more")
        for name, low, high in (
            ("lr", 0.0, math.inf),
            ("epochs", 0.0, math.inf),
            ("temperature", 0.0, math.inf),
            ("max_grad_norm", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low < value < high:
                raise FairyError(f"--{_option(name)} is {value}; allowed: above {low:g}, finite")
        for name in ("eval_share", "warmup", "decay", "lr_end", "distill", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise FairyError(f"--{_option(name)} is {value}; allowed: 0 to 1")
        if not 0 <= self.seed < 1 << 32:  # what NumPy takes
            raise FairyError(f"--seed is {self.seed}; allowed: 0 to {(1 << 32) - 1}")
        if self.warmup + (self.decay if self.schedule == "wsd" else 0) > 1:
            raise FairyError(
                f"--warmup {self.warmup} and --decay {self.decay} are more than the whole run; "
                "allowed: a sum of at most 1"
            )
        if self.teacher is not None and not self.distill:
            raise FairyError("--teacher is given without --distill; add --distill 0.5, say")

    @property
    def run_directory(self) -> Path:
        """Where checkpoints and metrics of the unfinished run lie."""
        output = as_path("the output", self.output)
        return output.with_name(output.name + ".run")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self) | {"quant": self.quant.to_json()}


def _option(name: str) -> str:
    return name.replace("_", "-")
