"""`build`: a checkpoint in, an artifact directory out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fairy_compile.artifact import check_output, staged_directory
from fairy_compile.compiler.cuda_binary import check_nvcc
from fairy_compile.compiler.export import check_linker, export_library
from fairy_compile.compiler.library import Sizes, entry_points
from fairy_compile.compiler.pipeline import Progress, compile_module
from fairy_compile.compiler.report import BuildReport, describe_call
from fairy_compile.compiler.write import Work, param_nbytes, write_configs, write_params
from fairy_compile.config import Granularity, QuantConfig, check_choice
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.convert import convert, refuse_dry_run
from fairy_compile.frontends.source import open_source
from fairy_compile.models import DecoderConfig, parse_config
from fairy_compile.models.config import KV_DTYPES
from fairy_compile.targets import Target, activation_dtype, load_target
from fairy_compile.tvm_pair import check_tvm_pair

if TYPE_CHECKING:
    from fairy_compile.calibrate import Calibration

DEFAULT_CONTEXT = 4096
DEFAULT_PREFILL_CHUNK = 256
# Room for the library, tokenizer and JSON files beside the parameters.
_OTHER_FILES_BYTES = 64 << 20


def build(
    model: str | Path,
    *,
    target: str = "cpu",
    quant: str | QuantConfig = "w2",
    method: str = "auto",
    scale: Granularity | None = None,
    calibrate: Calibration | str | Path | None = None,
    bits: float | None = None,
    act: str | None = None,
    kv_dtype: str | None = None,
    output: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    context: int | None = None,
    prefill_chunk: int | None = None,
    max_batch: int = 4,
    exempt: Sequence[str] = (),
    debug_dump: str | Path | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Compile a model into an artifact: a model directory with library and packed weights.

    Args:
        model: Hugging Face directory or hub id, or a packed checkpoint (`convert`, QAT export).
            A packed checkpoint brings its own quantisation.
        target: name of a file in ``targets/``; ``cpu`` is this machine.
        quant: ``w1`` .. ``w4``, or a whole `QuantConfig`, which then also sets method, scale, act
            and exempt layers unless they are given here.
        method: how codes are chosen; see `QuantConfig`.
        scale: granularity of scales.
        calibrate: text to calibrate on, see `convert`; needs the extra ``train``.
        bits: mean bits a weight under which T is chosen for every layer, see `convert`.
        act: activation contract, ``int8``, ``int16`` or ``float``. GPU kernels without the asked
            one keep activations in float16, or in float32 for ``float``.
        kv_dtype: dtype of cached keys and values, ``float16`` or ``float32``; default float32 with
            float activations and on GPUs without 16-bit floats, else float16.
        output: artifact directory; may be left out for a dry run.
        force: replace an existing artifact.
        dry_run: plan and report, write nothing.
        context: longest sequence; default the model's, at most 4096.
        prefill_chunk: most tokens of one prefill call; default 256.
        max_batch: most sequences at a time.
        exempt: glob patterns of layers to leave dense.
        debug_dump: directory for the IR after every phase.
        progress: called as progress(what, done, total).

    Returns:
        `BuildReport` with the kernel, layout, bytes and reason of every layer.

    Raises:
        FairyError: the input cannot be built; the message says what to do. Nothing is written.
    """
    check_tvm_pair()
    clock = _Clock()
    config_quant = _quant_config(quant, method, scale, act, exempt)
    compile_for = load_target(target)
    with clock("read headers"):
        source = open_source(model)
        asked = config_quant
        config_quant, quant_note = source.settle(
            asked, calibrated=calibrate is not None, by_budget=bits is not None
        )
        decoder = parse_config(source.config)
        decoder = replace(
            decoder,
            kv_dtype=_kv_dtype(kv_dtype, config_quant.act, compile_for),
            act_dtype=activation_dtype(compile_for, config_quant.act),
        )
        sizes, notes = _sizes(decoder, context, prefill_chunk, max_batch)
        if quant_note:
            notes.append(quant_note)
    if output is None and not dry_run:
        raise FairyError("build needs a place for the artifact; give it with -o DIR")
    if output is not None:
        check_output(output, force=force)  # before the minutes of work, not after
        check_linker(compile_for)
        if compile_for.device == "cuda":
            check_nvcc(compile_for)
    name = source.directory.resolve().name if Path(model).is_dir() else str(model)
    if source.quant is not None:
        notes.append("the checkpoint is packed: its own stages and scales were kept")
    converted = None
    if bits is not None and dry_run:
        refuse_dry_run()
    if (calibrate is not None or bits is not None) and not dry_run:
        with clock("convert"):
            converted = converted_path(Path(output))
            done = convert(
                model,
                converted,
                quant=asked,
                calibrate=calibrate,
                bits=bits,
                force=True,
                progress=progress,
                reuse=True,
            )
        notes += done.notes[1:]  # the first is the one of `settle`
        source = open_source(converted)
        config_quant, _ = source.settle(asked)
    work = Work(name, source, config_quant, compile_for, decoder, sizes)
    with clock("define"):
        work.define()
    report = _report(work, notes)
    if dry_run:
        report.seconds = clock.seconds
        return report
    needed = report.param_bytes + _OTHER_FILES_BYTES
    staged = staged_directory(
        output, force=force, needed_bytes=needed, resume_key=work.resume_key()
    )
    with staged as directory:
        with clock("weights"):
            written, demands = write_params(work, directory, progress)
        if demands:
            with clock("define again"):
                work.define(demands)
                report.layers = [describe_call(call) for call in work.planner.calls]
        with clock("compile"):
            executable = compile_module(
                work.module,
                compile_for,
                entry_points(compile_for),
                debug_dump=Path(debug_dump) if debug_dump else None,
                progress=progress,
            )
            export_library(executable, compile_for, directory, progress)
        with clock("finish"):
            write_configs(work, directory, written, report)
    if converted is not None:
        shutil.rmtree(converted, ignore_errors=True)
    report.output = str(output)
    report.seconds = clock.seconds
    return report


def converted_path(output: Path) -> Path:
    """Return where the packed checkpoint lies between conversion and the end of a build."""
    output = output.expanduser()
    return output.with_name(f".{output.name}.converted")


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(time.perf_counter() - start, 3)


def _quant_config(
    quant: str | QuantConfig,
    method: str,
    scale: Granularity | None,
    act: str | None,
    exempt: Sequence[str],
) -> QuantConfig:
    base = quant if isinstance(quant, QuantConfig) else QuantConfig(quant)
    return QuantConfig(
        quant=base.quant,
        scale=scale or base.scale,
        terms=base.terms,
        act=act or base.act,
        method=method if method != "auto" else base.method,
        exempt=tuple(exempt) or base.exempt,
        stages_for=base.stages_for,
    )


def _kv_dtype(asked: str | None, act: str, target: Target) -> str:
    lacks_float16 = target.is_gpu and not target.has("float16")
    if asked is None:
        return "float32" if act == "float" or lacks_float16 else "float16"
    check_choice("--kv-dtype", asked, KV_DTYPES)
    if asked == "float16" and lacks_float16:
        raise UnsupportedError(
            f"--kv-dtype float16: target {target.name} has no 16-bit floats; allowed: float32"
        )
    return asked


def _sizes(
    decoder: DecoderConfig, context: int | None, prefill_chunk: int | None, max_batch: int
) -> tuple[Sizes, list[str]]:
    for flag, value in (
        ("--context", context),
        ("--prefill-chunk", prefill_chunk),
        ("--max-batch", max_batch),
    ):
        if value is not None and value < 1:
            raise FairyError(f"{flag} is {value}; allowed: 1 and more")
    notes = []
    if context is not None and context > decoder.context:
        raise FairyError(
            f"--context {context} is more than {decoder.context}, the limit "
            f"{decoder.context_reason}"
        )
    chosen = context or min(decoder.context, DEFAULT_CONTEXT)
    if chosen < decoder.context and context is None:
        notes.append(
            f"context is {chosen} tokens; the model takes {decoder.context} (--context changes it)"
        )
    chunk = min(prefill_chunk or DEFAULT_PREFILL_CHUNK, chosen)
    return Sizes(chosen, chunk, max_batch), notes


def _report(work: Work, notes: list[str]) -> BuildReport:
    layers = [describe_call(call) for call in work.planner.calls]
    dense = [layer for layer in layers if not layer.stages]
    if dense:
        notes.append(f"{len(dense)} of {len(layers)} linear calls stay dense; see their reasons")
    return BuildReport(
        model=work.name,
        family=work.decoder.model_type,
        target=work.target.name,
        output=None,
        layers=layers,
        param_bytes=sum(param_nbytes(p) for p in work.params),
        sizes={
            "context": work.sizes.context,
            "prefill_chunk": work.sizes.prefill_chunk,
            "max_batch": work.sizes.max_batch,
            "kv_dtype": work.decoder.kv_dtype,
            "act_dtype": work.decoder.act_dtype,
        },
        notes=notes,
    )
