"""``fairy_compile convert``: a model becomes a packed checkpoint, small and for any target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fairy_compile.cli import options
from fairy_compile.cli.output import print_json, print_layers, progress_bar
from fairy_compile.errors import FairyError

if TYPE_CHECKING:
    from fairy_compile.frontends import ConvertReport


def convert(
    model: options.Model,
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
    output: options.Output = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    exempt: options.Exempt = None,
    dense_dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dense-dtype", help="Store what stays dense as float16."),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--revision", help="Branch, tag or commit of a hub model."),
    ] = None,
) -> None:
    """Write the packed checkpoint of a model."""
    from fairy_compile.config import QuantConfig
    from fairy_compile.frontends import convert as convert_model

    if output is None:
        raise FairyError("convert needs a place for the checkpoint; give it with -o DIR")
    config = QuantConfig(
        quant,
        scale=scale or "tensor",
        act=act,
        method=method,
        exempt=tuple(exempt or ()),
        stages_for=options.parse_layer_quant(layer_quant),
    )
    calibration = options.parse_calibration(
        calibrate, calibrate_tokens, calibrate_window, text_field, tune
    )
    with progress_bar() as progress:
        report = convert_model(
            model,
            output,
            quant=config,
            calibrate=calibration,
            bits=bits,
            rotate=rotate,
            force=force,
            dry_run=dry_run,
            dense_dtype=dense_dtype,
            progress=progress,
            revision=revision,
        )
    if json:
        print_json(report.to_json())
    else:
        _print_report(report)


_TITLES = {"nmse": "weight error", "output_error": "output error", "loss": "est. loss"}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 0.001 else f"{value:.4f}"


def _print_report(report: ConvertReport) -> None:
    from fairy_compile.artifact import human_bytes

    optional = ("nmse", "output_error", "loss")
    shown = [key for key in optional if any(getattr(r, key) is not None for r in report.layers)]
    if not any(layer.output_error is not None for layer in report.layers):
        shown = []  # errors of weights alone, of which a summary says enough
    print_layers(
        ("shape", "T", "bits", "bytes", *(_TITLES[key] for key in shown)),
        (
            (
                layer.name,
                (
                    "x".join(map(str, layer.shape)),
                    str(layer.stages or "-"),
                    f"{layer.bits_per_weight:.2f}",
                    human_bytes(layer.nbytes),
                    *(_figure(getattr(layer, key)) for key in shown),
                ),
                layer.reason,
            )
            for layer in report.layers
        ),
    )
    for note in report.notes:
        typer.echo(f"note: {note}")
    errors = [layer.nmse for layer in report.layers if layer.nmse is not None]
    if errors:
        typer.echo(
            f"relative squared error of the weights: mean {sum(errors) / len(errors):.4f}, "
            f"largest {max(errors):.4f}"
        )
    size = f"{human_bytes(report.nbytes)}, {report.bits_per_weight:.2f} bits per linear weight"
    if report.dry_run:
        typer.echo(f"{size}; dry run: nothing was written")
    else:
        typer.echo(f"wrote {report.output}: {size}, in {report.seconds:.1f} s")
