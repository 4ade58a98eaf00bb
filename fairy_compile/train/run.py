"""`train`: a real-valued checkpoint and text become a checkpoint of phase codes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from fairy_compile.artifact.staging import check_output
from fairy_compile.documents import data_files
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.files import read_config
from fairy_compile.qat.experts import find_experts
from fairy_compile.qat.export import export
from fairy_compile.qat.prepare import PrepareReport, prepare
from fairy_compile.train.blocks import Blocks, check_vocabulary
from fairy_compile.train.config import TrainConfig
from fairy_compile.train.inputs import (
    read_blocks,
    tokenizer_directory,
    vocabulary,
    with_block,
    with_native_terms,
)
from fairy_compile.train.metrics import CSV, EVENTS, PLOT, MetricsLog, plot_losses, read_metrics
from fairy_compile.train.models import load_model, model_directory, quiet_transformers
from fairy_compile.train.rundir import exclusive, last_checkpoint, open_run
from fairy_compile.train.trainer import (
    Diverged,
    Progress,
    QatTrainer,
    Report,
    WeightDecay,
)

SUMMARY = "train.json"
_POINTS = 10  # evaluations and checkpoints of a run, unless asked otherwise
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class TrainReport:
    """What `train` did.

    Attributes:
        output: the checkpoint, which `build` reads; master weights are in its ``latents``.
        steps: optimiser steps of the run.
        resumed_from: step this process began at.
        tokens: trained on.
        loss: last logged training loss.
        eval_loss: last evaluation, None without evaluation.
        seconds: training time of all processes that worked on the run, one after the other.
        tokens_per_second: of this process group.
        prepared: what became of every linear layer.
        notes: sentences worth knowing.
    """

    output: Path
    steps: int
    resumed_from: int
    tokens: int
    loss: float | None
    eval_loss: float | None
    seconds: float
    tokens_per_second: float
    prepared: PrepareReport
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"output": str(self.output), "prepared": self.prepared.to_json()}


def train(
    config: TrainConfig,
    *,
    force: bool = False,
    keep_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> TrainReport:
    """Train a model through the phase rule and export it.

    A run that was killed goes on from its last checkpoint when the same call is made again, with
    the same data order and random numbers. Under torchrun every process calls this.

    Args:
        config: the run.
        force: replace an existing output, and an unfinished run with other settings.
        keep_run: keep the directory of checkpoints after the end.
        progress: called after every row of metrics, in the first process.

    Raises:
        FairyError: an input cannot be trained with, the output exists, or training diverged; the
            last good checkpoint stays in the run directory.
    """
    check_output(config.output, force=force)
    plan(config)  # finds most mistakes before the minutes of work
    directory = model_directory(config.model, scratch=config.scratch)
    tokenizer = tokenizer_directory(config, directory)
    config, note = with_native_terms(with_block(config, directory), directory)
    with quiet_transformers():
        args = _arguments(config)  # joins the other processes
        _check_sharding(config, args)
        first = args.process_index == 0
        with exclusive(config.run_directory) if first else contextlib.nullcontext():
            report = _train(config, args, directory, tokenizer, force, keep_run, progress)
    report.notes.extend([note] if note else [])
    return report


def plan(config: TrainConfig) -> PrepareReport:
    """Tell which layers a run would train through the rule; reads no weights, writes nothing.

    Raises:
        FairyError: see `train`.
    """
    directory = model_directory(config.model, scratch=config.scratch)
    check_vocabulary(tokenizer_directory(config, directory), vocabulary(directory))
    config, note = with_native_terms(with_block(config, directory), directory)
    for data in (config.data, config.eval_data):
        if data is not None:
            data_files(data)
    with quiet_transformers(), torch.device("meta"):
        model = load_model(directory, scratch=True)
    report = prepare(model, config.quant)
    report.notes.extend([note] if note else [])
    return report


def _train(
    config: TrainConfig,
    args: TrainingArguments,
    directory: Path,
    tokenizer: Path,
    force: bool,
    keep_run: bool,
    progress: Callable[[Progress], None] | None,
) -> TrainReport:
    run = config.run_directory
    with args.main_process_first(desc="data"):
        resume = open_run(config, args.world_size, force=force)
        trained, held = read_blocks(config, directory, tokenizer, run, resuming=resume is not None)
    transformers.set_seed(config.seed)
    model = load_model(directory, scratch=config.scratch)
    teacher = _teacher(config, directory)
    if config.fsdp and (experts := next(iter(find_experts(model)), None)):
        raise UnsupportedError(
            f"--fsdp was not seen to shard experts such as {experts} and to go on from their "
            "checkpoints; train without it, every process then holds the whole model"
        )
    prepared = prepare(model, config.quant)
    notes = list(prepared.notes)
    steps = _steps(config, trained, args)
    every = math.ceil(steps / _POINTS)
    args.max_steps = steps
    args.logging_steps = min(config.log_every, steps)
    args.save_steps = _multiple(config.save_every or every, args.logging_steps)
    args.eval_steps = config.eval_every or _multiple(every, args.logging_steps)
    args.eval_strategy = transformers.IntervalStrategy("steps" if held else "no")
    if held is None:
        notes.append("no evaluation: the data is a single block, or --eval-share is 0")

    start = int(resume.name.rpartition("-")[2]) if resume else 0
    main = args.process_index == 0
    log = MetricsLog(run, start) if main else None
    tokens_per_step = config.block * config.batch * config.accumulate * args.world_size
    report = Report(
        tokens_per_step,
        log.write if log else lambda row: None,
        progress,
        time.monotonic,
        log.seconds if log else 0.0,
    )
    trainer = QatTrainer(
        config,
        prepared.quant,
        autocast=_bfloat16(config, args),
        teacher=teacher,
        model=model,
        args=args,
        train_dataset=trained,
        eval_dataset=held,
        callbacks=[WeightDecay(config), report],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if held is not None and not _evaluated(trainer):
            trainer.evaluate()
    except Diverged as error:
        raise Diverged(f"{error}; {_way_out(config, run)}") from error
    finally:
        if log:
            log.close()
            plot_losses(read_metrics(run / CSV), run / PLOT, _title(config))
    rows = read_metrics(run / CSV)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    evaluated = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
    result = TrainReport(
        output=Path(config.output),
        steps=steps,
        resumed_from=start,
        tokens=steps * tokens_per_step,
        loss=losses[-1] if losses else None,
        eval_loss=evaluated[-1] if evaluated else None,
        seconds=max((row["seconds"] or 0.0 for row in rows), default=0.0),
        tokens_per_second=rows[-1]["tokens_per_second"] or 0.0 if rows else 0.0,
        prepared=prepared,
        notes=notes,
    )
    _export(config, trainer, result, tokenizer, run, force=force)
    if main and not keep_run:
        shutil.rmtree(run, ignore_errors=True)
    return result


def _evaluated(trainer: QatTrainer) -> bool:
    """Tell whether the last step was evaluated; versions of transformers differ in doing so."""
    done = trainer.state.global_step
    return any(e["step"] == done and "eval_loss" in e for e in trainer.state.log_history)


def _arguments(config: TrainConfig) -> TrainingArguments:
    more: dict[str, Any] = {}
    if config.fsdp:
        more = {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
    if config.checkpointing:
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        new, old = "activation_checkpointing", "gradient_checkpointing"  # transformers 5 and 4
        more[new if new in known else old] = True
    args = TrainingArguments(
        output_dir=str(config.run_directory),
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        torch_compile=config.compile,
        use_cpu=config.cpu,
        seed=config.seed,
        save_total_limit=_KEPT_CHECKPOINTS,
        save_strategy="steps",
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and not config.cpu,
        disable_tqdm=True,
        report_to=[],
        **more,
    )
    args._n_gpu = min(1, args.n_gpu)  # a process has one GPU: more go through torchrun
    return args


def _check_sharding(config: TrainConfig, args: TrainingArguments) -> None:
    """Refuse ``fsdp`` where accelerate would quietly do without."""
    if not config.fsdp:
        return
    if args.world_size < 2:
        raise FairyError(
            "--fsdp shards over several processes and there is one; start the command with "
            "torchrun --nproc-per-node GPUS -m fairy_compile.cli train ..."
        )
    if args.device.type == "cpu":
        raise UnsupportedError(
            "--fsdp shards over GPUs, and these processes compute on the CPU; leave it out, and "
            "every process holds the whole model"
        )


def _teacher(config: TrainConfig, directory: Path) -> Any:
    if not config.distill:
        return None
    if config.scratch and config.teacher is None:
        raise FairyError("a model from scratch cannot teach itself; name a --teacher")
    teacher = load_model(model_directory(config.teacher) if config.teacher else directory)
    size = read_config(directory)["vocab_size"]
    if teacher.config.vocab_size != size:
        raise FairyError(
            f"the teacher's vocabulary is {teacher.config.vocab_size} tokens and the model's "
            f"{size}; distillation needs the same tokenizer on both sides"
        )
    return teacher.eval().requires_grad_(False)


def _steps(config: TrainConfig, trained: Blocks, args: TrainingArguments) -> int:
    """Return the optimiser steps of the run."""
    if config.steps is not None:
        return config.steps
    sequences = config.batch * config.accumulate * args.world_size
    return max(1, math.ceil(config.epochs * len(trained) / sequences))


def _multiple(value: int, of: int) -> int:
    return math.ceil(value / of) * of


def _bfloat16(config: TrainConfig, args: TrainingArguments) -> bool:
    if config.precision != "auto":
        return config.precision == "bf16"
    return args.device.type == "cuda" and torch.cuda.is_bf16_supported()


def _title(config: TrainConfig) -> str:
    return f"{Path(config.model).name}, {config.quant.quant} per {config.quant.scale}"


def _way_out(config: TrainConfig, run: Path) -> str:
    """Say what is left after a divergence, and what to try."""
    checkpoint = last_checkpoint(run)
    advice = f"try a smaller --lr than {config.lr:g}, or a longer --warmup"
    if checkpoint is None:
        return f"no checkpoint was written before; {advice}"
    return (
        f"the last good checkpoint is {checkpoint}, which can be built and trained further like "
        f"any model; {advice}, and --force to begin anew"
    )


def _export(
    config: TrainConfig,
    trainer: QatTrainer,
    report: TrainReport,
    tokenizer: Path,
    run: Path,
    *,
    force: bool,
) -> None:
    """Write the checkpoint from the first process; gathering the weights takes all of them."""
    weights = trainer.accelerator.get_state_dict(trainer.model) if config.fsdp else None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)

    def extra(staging: Path) -> None:
        for name in (CSV, PLOT):
            if (run / name).is_file():
                shutil.copyfile(run / name, staging / name)
        if (run / EVENTS).is_dir():
            shutil.copytree(run / EVENTS, staging / EVENTS)
        summary = {"settings": config.to_json(), "report": report.to_json()}
        text = json.dumps(summary, indent=1) + "\n"
        (staging / SUMMARY).write_text(text, encoding="utf-8")

    if trainer.args.process_index == 0:
        model.eval()
        export(
            model,
            config.output,
            tokenizer=tokenizer,
            force=force,
            state_dict=weights,
            extra=extra,
        )
    trainer.accelerator.wait_for_everyone()
