"""`build`: a checkpoint in, an artifact directory out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

from fairy_compile.artifact import (
    EngineSizes,
    LayerEntry,
    Manifest,
    ModelInfo,
    ParamEntry,
    ParamWriter,
    Source,
    TargetInfo,
    WrittenParams,
    chat_config,
    check_chat_config,
    check_library,
    check_output,
    copy_tokenizer_files,
    describe_files,
    signatures_of,
    staged_directory,
)
from fairy_compile.artifact.mlc_config import MLC_CHAT_CONFIG
from fairy_compile.artifact.schema import dump_json, load_object
from fairy_compile.artifact.tensor_cache import ITEMSIZE, TENSOR_CACHE
from fairy_compile.compiler import params as parameters
from fairy_compile.compiler.export import check_linker, export_library, library_name
from fairy_compile.compiler.library import ENTRY_POINTS, Param, Sizes, define
from fairy_compile.compiler.pipeline import Progress, compile_module
from fairy_compile.compiler.plan import Planner
from fairy_compile.compiler.report import BuildReport, describe_call
from fairy_compile.config import Granularity, QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends.source import ModelSource, open_source
from fairy_compile.models import DecoderConfig, parse_config
from fairy_compile.targets import Target, load_target
from fairy_compile.tvm_pair import TVM_PAIR, check_tvm_pair

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
    act: str | None = None,
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
        act: activation contract, ``int8`` or ``float``.
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
        if source.quant is not None:
            # Stages and scales of a packed checkpoint were fixed when it was made.
            config_quant = replace(
                source.quant,
                act=config_quant.act,
                exempt=tuple(exempt) or source.quant.exempt,
            )
        decoder = parse_config(source.config)
        sizes, notes = _sizes(decoder, context, prefill_chunk, max_batch)
    if output is None and not dry_run:
        raise FairyError("build needs a place for the artifact; give it with -o DIR")
    if output is not None:
        check_output(output, force=force)  # before the minutes of work, not after
        check_linker(compile_for)
    name = source.directory.resolve().name if Path(model).is_dir() else str(model)
    work = _Work(name, source, config_quant, compile_for, decoder, sizes)
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
            written, demands = _write_params(work, directory, progress)
        if demands:
            with clock("define again"):
                work.define(demands)
                report.layers = [describe_call(call) for call in work.planner.calls]
        with clock("compile"):
            executable = compile_module(
                work.module,
                compile_for,
                list(ENTRY_POINTS),
                debug_dump=Path(debug_dump) if debug_dump else None,
                progress=progress,
            )
            export_library(executable, compile_for, directory)
        with clock("finish"):
            _write_configs(work, directory, written, report)
    report.output = str(output)
    report.seconds = clock.seconds
    return report


@dataclass
class _Work:
    """The pieces a build passes along; ``name`` is the directory's last part or the hub id."""

    name: str
    source: ModelSource
    quant: QuantConfig
    target: Target
    decoder: DecoderConfig
    sizes: Sizes

    def define(self, demands: parameters.Demands | None = None) -> None:
        """Plan kernels and build the Relax module."""
        self.planner = Planner(self.source, self.quant, self.target, demands)
        self.module, self.params, self.metadata = define(
            self.decoder, self.planner, self.target, self.sizes, f"fairy-{self.quant.quant}"
        )
        self.signatures = signatures_of(self.module)
        problems = check_library(
            self.signatures, self.metadata, self.target.device, self.decoder.vocab_size
        )
        if problems:
            raise RuntimeError("the library breaks the engine's contract: " + "; ".join(problems))

    def resume_key(self) -> str:
        """Return what identifies the result: inputs, options, target and versions."""
        files = {
            p.name: [p.stat().st_size, p.stat().st_mtime_ns]
            for p in sorted(self.source.directory.iterdir())
            if p.is_file()
        }
        facts = [
            str(self.source.directory.resolve()),
            files,
            self.quant.to_json(),
            self.target.name,
            str(self.target.to_tvm()),
            [[p.name, p.shape, p.dtype] for p in self.params],
            [self.sizes.context, self.sizes.prefill_chunk, self.sizes.max_batch],
            TVM_PAIR,
            package_metadata.version("fairy-compile"),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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


def _report(work: _Work, notes: list[str]) -> BuildReport:
    layers = [describe_call(call) for call in work.planner.calls]
    dense = [layer for layer in layers if not layer.stages]
    if dense:
        notes.append(f"{len(dense)} of {len(layers)} linear calls stay dense; see their reasons")
    if work.source.quant is not None:
        notes.append("the checkpoint is packed: its own stages and scales were kept")
    return BuildReport(
        model=work.name,
        family=work.decoder.model_type,
        target=work.target.name,
        output=None,
        layers=layers,
        param_bytes=sum(_nbytes(p) for p in work.params),
        sizes={
            "context": work.sizes.context,
            "prefill_chunk": work.sizes.prefill_chunk,
            "max_batch": work.sizes.max_batch,
        },
        notes=notes,
    )


def _nbytes(param: Param) -> int:
    size = ITEMSIZE[param.dtype]
    for dim in param.shape:
        size *= dim
    return size


# Beside the shards of an unfinished build: what the weights written so far demand.
_DEMANDS = "demands-progress.json"


def _write_params(
    work: _Work, directory: Path, progress: Progress | None
) -> tuple[WrittenParams, parameters.Demands]:
    writer = ParamWriter.resume(directory)
    done = frozenset(p.name for p in work.params if writer.has(p.name))
    notes = directory / _DEMANDS
    demands: parameters.Demands = load_object(notes) if done and notes.is_file() else {}
    noted = len(demands)
    arrays = parameters.iterate(work.params, work.planner, demands, done)
    for count, (name, array) in enumerate(arrays, len(done)):
        if progress:
            progress(f"weights: {name}", count, len(work.params))
        if len(demands) > noted:  # before the shard, so that no closed shard goes without
            noted = len(demands)
            dump_json(notes, demands)
        writer.add(name, array)
    notes.unlink(missing_ok=True)
    weights = sum(
        row.shape[0] * row.shape[1] for row in (describe_call(c) for c in work.planner.calls)
    )
    bits = 8 * sum(_nbytes(p) for p in work.params if p.call) / max(1, weights)
    return writer.finish({"BitsPerParam": round(bits, 3)}), demands


def _write_configs(
    work: _Work, directory: Path, written: WrittenParams, report: BuildReport
) -> None:
    tokenizer = copy_tokenizer_files(work.source.tokenizer_files(), directory)
    chat = chat_config(
        directory,
        work.source.config,
        EngineSizes(
            vocab_size=work.decoder.vocab_size,
            context_window_size=work.sizes.context,
            prefill_chunk_size=work.sizes.prefill_chunk,
            max_batch_size=work.sizes.max_batch,
        ),
        model_type=work.decoder.model_type,
        quantization=work.metadata["quantization"],
    )
    problems = check_chat_config(chat.config, work.target.device)
    if problems:
        raise RuntimeError(f"{MLC_CHAT_CONFIG} breaks the engine's contract: {problems}")
    if chat.conv_template_reason:
        report.notes.append(f"MLC conversation template: {chat.conv_template_reason}")
    chat.write(directory)
    library = library_name(work.target)
    names = [*tokenizer, *written.files, MLC_CHAT_CONFIG, TENSOR_CACHE, library]
    files = describe_files(directory, names, known=written.files)
    manifest = Manifest(
        fairy_compile=package_metadata.version("fairy-compile"),
        tvm=TVM_PAIR["apache-tvm"],
        tvm_ffi=TVM_PAIR["apache-tvm-ffi"],
        source=Source(work.source.kind, report.model, work.source.sha256()),
        quant=work.quant.to_json(),
        target=TargetInfo(
            work.target.name,
            work.target.device,
            str(work.target.to_tvm()),
            tuple(sorted(work.target.features)),
        ),
        model=ModelInfo(work.decoder.model_type, _model_sizes(work.decoder) | report.sizes),
        files=files,
        layers=tuple(
            LayerEntry(
                name=row.name,
                kernel=row.kernel,
                layout=row.layout,
                bytes=row.bytes,
                reason=row.reason,
                stages=row.stages,
                terms=row.terms,
                scale=row.scale,
                shape=row.shape,
            )
            for row in report.layers
        ),
        params=tuple(ParamEntry(p.name, p.shape, p.dtype, parameters.role(p)) for p in work.params),
        library=library,
        functions={name: str(work.signatures[name]) for name in ENTRY_POINTS},
        metadata=work.metadata,
    )
    manifest.write(directory)
    report.files = {name: entry.bytes for name, entry in files.items()}


def _model_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_layers": decoder.num_layers,
        "num_heads": decoder.num_heads,
        "num_kv_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
    }
