"""``fairy_compile train``: a real-valued checkpoint and text become a checkpoint of phase codes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json, print_layers
from fairy_compile.errors import FairyError

if TYPE_CHECKING:
    from fairy_compile.qat import PrepareReport
    from fairy_compile.train.run import TrainReport
    from fairy_compile.train.trainer import Progress

# Optional[] and not "| None": typer reads these annotations at run time.
Number = Optional[int]  # noqa: UP045
Text = Optional[str]  # noqa: UP045


def train(
    model: Annotated[
        str, typer.Argument(help="Model directory or hub id; a checkpoint of `train` goes on.")
    ],
    data: options.Data = None,
    quant: options.Quant = "w2",
    scale: options.Scale = None,
    act: options.Act = "int8",
    exempt: options.Exempt = None,
    layer_quant: options.LayerQuant = None,
    output: options.Output = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Random weights for the model's config.json.")
    ] = False,
    tokenizer: Annotated[
        Text, typer.Option("--tokenizer", metavar="DIR", help="Tokenizer  [default: the model's]")
    ] = None,
    eval_data: Annotated[
        Text,
        typer.Option(
            "--eval-data", metavar="PATH", help="Text to evaluate on  [default: part of --data]"
        ),
    ] = None,
    eval_share: Annotated[
        float, typer.Option("--eval-share", help="Share of --data held out without --eval-data.")
    ] = 0.01,
    text_field: options.DataField = "text",
    steps: Annotated[
        Number, typer.Option("--steps", help="Optimiser steps  [default: by --epochs]")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0,
    block: Annotated[
        Number,
        typer.Option("--block", help="Tokens a sequence  [default: the model's context, 1024 max]"),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences a device and pass.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Passes a step.")] = 1,
    lr: Annotated[
        float, typer.Option("--lr", help="Peak; a third of pre-training's is a good start.")
    ] = 1e-4,
    schedule: Annotated[
        str, typer.Option("--schedule", help="wsd, two-stage, cosine, constant.")
    ] = "wsd",
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps.")] = 0.05,
    decay: Annotated[float, typer.Option("--decay", help="Share of the steps, for wsd.")] = 0.2,
    lr_end: Annotated[float, typer.Option("--lr-end", help="Last rate, share of --lr.")] = 0.02,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option("--max-grad-norm", help="Gradient clip.")] = 1.0,
    distill: Annotated[
        float, typer.Option("--distill", help="Share of the loss that follows a teacher, 0 to 1.")
    ] = 0.0,
    teacher: Annotated[
        Text,
        typer.Option("--teacher", metavar="MODEL", help="[default: the model, not quantised]"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of distillation.")] = 1.0,
    precision: Annotated[
        str, typer.Option("--precision", help="bf16, float32, auto: bf16 on GPUs that have it.")
    ] = "auto",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations to save memory.")
    ] = False,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard weights over the processes of torchrun.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of weights and data order.")] = 0,
    log_every: Annotated[int, typer.Option("--log-every", help="Steps between reports.")] = 10,
    eval_every: Annotated[
        Number, typer.Option("--eval-every", help="Steps  [default: a tenth of the run]")
    ] = None,
    save_every: Annotated[
        Number, typer.Option("--save-every", help="Steps  [default: a tenth of the run]")
    ] = None,
    keep_run: Annotated[
        bool, typer.Option("--keep-run", help="Keep OUTPUT.run, the checkpoints, after the end.")
    ] = False,
) -> None:
    """Train a model through the phase rule (QAT); the result is something `build` reads.

    A run that was stopped goes on when the same command is given again.
    """
    from fairy_compile.config import QuantConfig
    from fairy_compile.train import TrainConfig
    from fairy_compile.train import train as train_model

    if data is None:
        raise FairyError("train needs text to train on; give it with --data PATH")
    if output is None and not dry_run:
        raise FairyError("train needs a place for the checkpoint; give it with -o DIR")
    config = TrainConfig(
        model=model,
        data=data,
        output=str(output or "dry-run"),
        quant=QuantConfig(
            quant,
            scale=scale or "tensor",
            act=act,
            method="phase",
            exempt=tuple(exempt or ()),
            stages_for=options.parse_layer_quant(layer_quant),
        ),
        scratch=from_scratch,
        tokenizer=tokenizer,
        eval_data=eval_data,
        eval_share=eval_share,
        text_field=text_field,
        block=block,
        batch=batch,
        accumulate=accumulate,
        steps=steps,
        epochs=epochs,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        decay=decay,
        lr_end=lr_end,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        distill=distill,
        teacher=teacher,
        temperature=temperature,
        precision=precision,
        checkpointing=checkpointing,
        compile=compile_model,
        fsdp=fsdp,
        cpu=cpu,
        seed=seed,
        log_every=log_every,
        eval_every=eval_every,
        save_every=save_every,
    )
    if dry_run:
        from fairy_compile.train import plan

        report = plan(config)
        if json:
            print_json(report.to_json())
        else:
            _print_plan(report)
            typer.echo("dry run: nothing was trained or written")
        return
    result = train_model(config, force=force, keep_run=keep_run, progress=_print_progress)
    if os.environ.get("RANK", "0") != "0":
        return
    if json:
        print_json(result.to_json())
    else:
        _print_result(result)


def _print_progress(progress: Progress) -> None:
    words = [f"step {progress.step}/{progress.steps}"]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.4f}")
    if progress.eval_loss is not None:
        words.append(f"evaluation {progress.eval_loss:.4f}")
    words.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.step < progress.steps and progress.seconds_left == progress.seconds_left:
        words.append(f"{timedelta(seconds=round(progress.seconds_left))} left")
    typer.echo("  ".join(words), err=True)


def _print_plan(report: PrepareReport) -> None:
    print_layers(
        ("shape", "T"),
        (
            (layer.name, ("x".join(map(str, layer.shape)), str(layer.stages or "-")), layer.reason)
            for layer in report.layers
        ),
    )
    for note in report.notes:
        typer.echo(f"note: {note}")


def _print_result(report: TrainReport) -> None:
    for layer in report.prepared.dense:
        typer.echo(f"{layer.name} stays dense: {layer.reason}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    losses = [
        f"{what} {value:.4f}"
        for what, value in (("loss", report.loss), ("evaluation", report.eval_loss))
        if value is not None
    ]
    typer.echo(
        f"trained {len(report.prepared.phase)} layers for {report.steps} steps, {report.tokens:,} "
        f"tokens, in {timedelta(seconds=round(report.seconds))}: {', '.join(losses)}"
    )
    typer.echo(
        f"wrote {report.output}: phase codes, which `fairy_compile build` reads; master weights in "
        f"{report.output / 'latents'}"
    )
