"""``fairy_compile build``: a model becomes an artifact for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json, print_layers, progress_bar

if TYPE_CHECKING:
    from fairy_compile.compiler import BuildReport


def build(
    model: options.Model,
    target: options.Target = "cpu",
    quant: options.Quant = "w2",
    method: options.Method = "auto",
    scale: options.Scale = None,
    layer_quant: options.LayerQuant = None,
    bits: options.Bits = None,
    calibrate: options.Calibrate = None,
    calibrate_tokens: options.CalibrateTokens = None,
    calibrate_window: options.CalibrateWindow = None,
    text_field: options.TextField = None,
    tune: options.Tune = 0,
    rotate: options.Rotate = False,
    act: options.Act = "int8",
    act_dtype: options.ActDtype = None,
    kv_dtype: options.KvDtype = None,
    output: options.Output = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    context: options.Context = None,
    prefill_chunk: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--prefill-chunk", help="Most prompt tokens of one call  [default: 256]"),
    ] = None,
    max_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-batch", help="Most sequences at a time  [default: 4]"),
    ] = None,
    exempt: options.Exempt = None,
    cuda_graphs: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Record decode steps as CUDA graphs  [default: of the target]",
        ),
    ] = None,
    model_lib: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--model-lib", help="What a phone's app calls the library  [default: from -o]"
        ),
    ] = None,
    debug_dump: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--debug-dump", metavar="DIR", help="Write the IR after every phase here."),
    ] = None,
) -> None:
    """Compile a model for a target."""
    from fairy_compile.tvm_pair import check_tvm_pair

    check_tvm_pair()
    from fairy_compile.compiler import build as build_artifact
    from fairy_compile.config import QuantConfig

    with progress_bar() as progress:
        report = build_artifact(
            model,
            target=target,
            quant=QuantConfig(quant, stages_for=options.parse_layer_quant(layer_quant)),
            method=method,
            scale=scale,
            calibrate=options.parse_calibration(
                calibrate, calibrate_tokens, calibrate_window, text_field, tune
            ),
            bits=bits,
            rotate=rotate,
            act=act,
            act_dtype=act_dtype,
            kv_dtype=kv_dtype,
            output=output,
            force=force,
            dry_run=dry_run,
            context=context,
            prefill_chunk=prefill_chunk,
            max_batch=max_batch,
            exempt=tuple(exempt or ()),
            cuda_graphs=cuda_graphs,
            model_lib=model_lib,
            debug_dump=debug_dump,
            progress=progress,
        )
    if json:
        print_json(report.to_json())
    else:
        _print_report(report)


def _print_report(report: BuildReport) -> None:
    from fairy_compile.artifact import human_bytes

    print_layers(
        ("shape", "T", "bits", "bytes", "kernel"),
        (
            (
                layer.name,
                (
                    "x".join(map(str, layer.shape)),
                    str(layer.stages or "-"),
                    f"{layer.bits_per_weight:.2f}",
                    human_bytes(layer.bytes),
                    layer.kernel,
                ),
                f"{layer.kernel} over {layer.layout}: {layer.reason}",
            )
            for layer in report.layers
        ),
    )
    for note in report.notes:
        typer.echo(f"note: {note}")
    size = human_bytes(sum(report.files.values()) if report.files else report.param_bytes)
    seconds = sum(report.seconds.values())
    if report.output is None:
        typer.echo(f"{report.model} ({report.family}) for {report.target}: {size} of parameters")
        typer.echo("dry run: nothing was written")
    else:
        typer.echo(
            f"{report.model} ({report.family}) for {report.target}: wrote {report.output}, {size} "
            f"in {seconds:.1f} s"
        )
