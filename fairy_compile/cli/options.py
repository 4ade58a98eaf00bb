"""Options that mean the same for every verb that has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fairy_compile.config import ACT_CONTRACTS, GRANULARITIES, METHODS, QUANTS
from fairy_compile.errors import FairyError
from fairy_compile.targets import ACT_DTYPES

if TYPE_CHECKING:
    from fairy_compile.calibrate import Calibration

# Optional[] and not "| None": typer reads these annotations at run time.

Model = Annotated[
    str,
    typer.Argument(
        help="Model directory, Fairy2i .gguf file or Hugging Face hub id; for build also an ONNX "
        "file."
    ),
]
Artifact = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory that `fairy_compile build` wrote.")
]

Target = Annotated[
    str, typer.Option("--target", help="What to compile for; `fairy_compile targets` lists them.")
]
Quant = Annotated[
    str, typer.Option("--quant", help=f"Bits per weight: {', '.join(QUANTS)}.", show_default=True)
]
Method = Annotated[
    str, typer.Option("--method", help=f"How codes are chosen: {', '.join(METHODS)}.")
]
Scale = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--scale", help=f"One scale per: {', '.join(GRANULARITIES)}  [default: tensor]"),
]
Act = Annotated[str, typer.Option("--act", help=f"Activations: {', '.join(ACT_CONTRACTS)}.")]
ActDtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--act-dtype",
        help=f"dtype of activations between kernels, GPU targets: {', '.join(ACT_DTYPES)}  "
        "[default: float32 if --act float, else float16]",
    ),
]
KvDtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--kv-dtype",
        help="Cached keys and values: float16, float32  [default: float32 if --act float, else "
        "float16]",
    ),
]
Exempt = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--exempt", metavar="PATTERN", help="Layers to leave dense; may be repeated."),
]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", metavar="DIR", help="Directory to write."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output written before.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and sizes; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--device", help="Device to run on, e.g. cpu, cuda:0  [default: as built]"),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", help="CPU threads  [default: one a core]"),
]
Cpus = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--cpus", metavar="LIST", help="CPUs to run on, such as 0-3,6  [default: any]"),
]
Context = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--context", help="Most tokens of prompt and answer  [default: the model's]"),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")]
Temperature = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--temperature", help="0 is greedy  [default: the model's]"),
]
TopP = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--top-p", help="Draw from the likeliest tokens with this share."),
]
RepetitionPenalty = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--repetition-penalty", help="Above 1 avoids repetition."),
]
PresencePenalty = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--presence-penalty", help="Above 0 avoids tokens that occurred."),
]
FrequencyPenalty = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--frequency-penalty", help="Above 0 avoids tokens by how often they occurred."),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--seed", help="Same seed, same text."),
]
Stop = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated."),
]

LayerQuant = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--layer-quant",
        metavar="PATTERN=wN",
        help="Another T for some layers, e.g. lm_head=w3; may be repeated.",
    ),
]


Bits = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--bits", help="Mean bits a weight; chooses T for every layer, e.g. 2.2."),
]
Calibrate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--calibrate",
        metavar="TEXT",
        help="Text to look at: text, jsonl or parquet file, a directory of them, or a dataset.",
    ),
]
CalibrateTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--calibrate-tokens", help="Tokens of it to use  [default: 65536]"),
]
CalibrateWindow = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--calibrate-window",
        help="Tokens seen at a time  [default: the model's context, 2048 max]",
    ),
]
TextField = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--text-field", help="Key or column of the text  [default: text]"),
]

# What is measured or trained on, and files of results.
Data = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--data",
        metavar="PATH",
        help="Text, jsonl or parquet file, a directory of them, or a saved dataset.",
    ),
]
DataField = Annotated[str, typer.Option("--text-field", help="Key or column of the text.")]
ResultsName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--name", help="Name of those files  [default: the model's]"),
]
ReplaceResults = Annotated[bool, typer.Option("--force", help="Replace results written before.")]

Rotate = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Change the weights' bases first, which spreads outliers over all channels.",
    ),
]

Tune = Annotated[
    int,
    typer.Option(
        "--tune",
        metavar="STEPS",
        help="Then tune scales and norm gains on the text; holds the model in memory twice.",
    ),
]


def parse_calibration(
    text: str | None, tokens: int | None, window: int | None, field: str | None, tune: int = 0
) -> Calibration | None:
    """Return the `Calibration` of the options, None without ``--calibrate``.

    Raises:
        FairyError: an option that needs ``--calibrate`` is given without it.
    """
    from fairy_compile.calibrate import Calibration

    given = {"tokens": tokens, "window": window, "text_field": field}
    given = {key: value for key, value in given.items() if value is not None}
    if tune:
        given["tune"] = tune
    if text is not None:
        return Calibration(text, **given)
    if given:
        flags = {
            "tokens": "--calibrate-tokens",
            "window": "--calibrate-window",
            "text_field": "--text-field",
            "tune": "--tune",
        }
        flag = flags[next(iter(given))]
        raise FairyError(f"{flag} is given without text; add --calibrate TEXT")
    return None


def check_results(results: Path | None, name: str | None, force: bool) -> None:
    """Refuse options of files of results, which would be ignored where none are written.

    Raises:
        FairyError: ``--name`` or ``--force`` is given without ``--results``.
    """
    for option, given in (("--name", name is not None), ("--force", force)):
        if given and results is None:
            raise FairyError(f"{option} goes with --results; leave it out, or give --results DIR")


def parse_layer_quant(entries: list[str] | None) -> dict[str, int]:
    """Return pattern -> T of ``--layer-quant`` entries.

    Raises:
        FairyError: an entry is not ``PATTERN=wN``.
    """
    stages = {}
    for entry in entries or []:
        pattern, _, quant = entry.rpartition("=")
        if not pattern or quant not in QUANTS:
            raise FairyError(
                f"--layer-quant is {entry!r}; write a layer pattern and one of "
                f"{', '.join(QUANTS)}, such as lm_head=w3"
            )
        stages[pattern] = QUANTS[quant]
    return stages
