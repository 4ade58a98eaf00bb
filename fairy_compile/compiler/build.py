"""`build`: a checkpoint in, an artifact directory out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairy_compile.artifact import check_apart, check_output, staged_directory
from fairy_compile.artifact.files import directory_name
from fairy_compile.artifact.system_lib import (
    check_system_lib_name,
    default_system_lib_name,
    system_lib_prefix,
)
from fairy_compile.compiler.clock import Clock
from fairy_compile.compiler.cuda_graphs import plan_graphs
from fairy_compile.compiler.dtypes import kv_dtype as kv_dtype_of
from fairy_compile.compiler.dtypes import range_notes
from fairy_compile.compiler.export import check_linker, export_library
from fairy_compile.compiler.gate import check_executable, check_objects
from fairy_compile.compiler.graph import build_graph
from fairy_compile.compiler.library import Sizes
from fairy_compile.compiler.pipeline import Progress, compile_module
from fairy_compile.compiler.report import BuildReport, describe_call
from fairy_compile.compiler.unread import check_unread
from fairy_compile.compiler.write import (
    OTHER_FILES_BYTES,
    Work,
    param_nbytes,
    write_configs,
    write_params,
)
from fairy_compile.config import Granularity, QuantConfig, is_whole
from fairy_compile.errors import FairyError
from fairy_compile.frontends.convert import convert, refuse_dry_run
from fairy_compile.frontends.graph import Graph
from fairy_compile.frontends.maker import phase_plans
from fairy_compile.frontends.plan import unmatched_notes
from fairy_compile.frontends.rotate import RotatedSource
from fairy_compile.frontends.source import open_source
from fairy_compile.frontends.torch_module import import_torch, is_torch_module
from fairy_compile.models import DecoderConfig, page_tables, parse_config
from fairy_compile.models.config import at_context
from fairy_compile.paths import as_path
from fairy_compile.results import check_directory
from fairy_compile.targets import Target, activation_dtype, load_target
from fairy_compile.tvm_pair import check_tvm_pair

if TYPE_CHECKING:
    from torch import nn

    from fairy_compile.calibrate import Calibration

DEFAULT_CONTEXT = 4096
DEFAULT_PREFILL_CHUNK = 256
DEFAULT_MAX_BATCH = 4


def build(
    model: str | Path | nn.Module,
    example_inputs: Sequence[Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    target: str = "cpu",
    quant: str | QuantConfig = "w2",
    method: str = "auto",
    scale: Granularity | None = None,
    calibrate: Calibration | str | Path | None = None,
    bits: float | None = None,
    rotate: bool = False,
    act: str | None = None,
    act_dtype: str | None = None,
    kv_dtype: str | None = None,
    output: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    context: int | None = None,
    prefill_chunk: int | None = None,
    max_batch: int | None = None,
    exempt: Sequence[str] = (),
    cuda_graphs: bool | None = None,
    model_lib: str | None = None,
    debug_dump: str | Path | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Compile a model into an artifact: a model directory with library and packed weights.

    Args:
        model: Hugging Face directory or hub id, a packed checkpoint (`convert`, QAT export) or a
            Fairy2i model's GGUF file, both of which bring their own quantisation. Or any network
            whose linear layers are to be converted: an ONNX file (``model.onnx``) or a PyTorch
            module.
        example_inputs: of a PyTorch module: positional arguments of its forward, as tensors.
        dynamic_shapes: of a PyTorch module: dimensions that change, as `torch.export` takes them.
        target: name of a file in ``targets/``; ``cpu`` is this machine.
        quant: ``w1`` .. ``w4``, or a whole `QuantConfig`, which then also sets method, scale, act
            and exempt layers unless they are given here.
        method: how codes are chosen; see `QuantConfig`.
        scale: granularity of scales.
        calibrate: text to calibrate on, see `convert`; needs the extra ``train``.
        bits: mean bits a weight under which T is chosen for every layer, see `convert`.
        rotate: spread outliers over all channels first, see `convert`.
        act: activation contract, ``int8``, ``int16`` or ``float``. GPU kernels without the asked
            one keep activations in ``act_dtype``.
        act_dtype: dtype of activations between kernels of GPU targets, ``float16``, ``float32`` or
            ``bfloat16``; default float16, or float32 for act ``float`` and without 16-bit floats.
        kv_dtype: dtype of cached keys and values, ``float16`` or ``float32``; default float32 with
            float activations and on GPUs without 16-bit floats, else float16.
        output: artifact directory; may be left out for a dry run.
        force: replace an existing artifact.
        dry_run: plan and report, write nothing.
        context: longest sequence; default the model's, at most 4096.
        prefill_chunk: most tokens of one prefill call; default 256.
        max_batch: most sequences at a time; default 4. As the three above, of language models only.
        exempt: glob patterns of layers to leave dense, or one.
        cuda_graphs: record decode steps as CUDA graphs; default what the target's file says.
        model_lib: what a phone's app calls the library, where the target's is linked into one;
            default made of the output's name.
        debug_dump: directory for the IR after every phase.
        progress: called as progress(what, done, total).

    Returns:
        `BuildReport` with the kernel, layout, bytes and reason of every layer.

    Raises:
        FairyError: the input cannot be built; the message says what to do. Nothing is written.
    """
    check_tvm_pair()
    clock = Clock()
    config_quant = _quant_config(quant, method, scale, act, exempt)
    compile_for = load_target(target)
    if output is None and not dry_run:
        raise FairyError("build needs a place for the artifact; give it with -o DIR")
    if debug_dump is not None:
        debug_dump = as_path("debug_dump", debug_dump)
        check_directory("--debug-dump", debug_dump)
    if is_torch_module(model) or is_onnx(model):
        _refuse_for_graphs(
            {
                "--calibrate": calibrate,
                "--bits": bits,
                "--rotate": rotate or None,
                "--act-dtype": act_dtype,
                "--kv-dtype": kv_dtype,
                "--context": context,
                "--prefill-chunk": prefill_chunk,
                "--max-batch": max_batch,
                "--cuda-graphs": cuda_graphs,
                "--model-lib": model_lib,
            }
        )
        with clock("import"):
            graph = _import_graph(model, example_inputs, dynamic_shapes)
        return build_graph(
            graph,
            target=compile_for,
            quant=config_quant,
            output=output,
            force=force,
            dry_run=dry_run,
            debug_dump=debug_dump,
            progress=progress,
            clock=clock,
        )
    if example_inputs is not None or dynamic_shapes is not None:
        raise FairyError(
            "example inputs and dynamic shapes are for PyTorch modules; "
            f"{str(model)!r} is none, so leave them out"
        )
    system_lib = _system_lib(compile_for, model_lib, output)
    with clock("read headers"):
        source = open_source(model)
        if rotate:
            RotatedSource(source)  # refuses what cannot be rotated
        asked = config_quant
        config_quant, quant_note = source.settle(
            asked, calibrated=calibrate is not None, by_budget=bits is not None
        )
        decoder = parse_config(source.config)
        decoder = replace(
            decoder,
            kv_dtype=kv_dtype_of(kv_dtype, config_quant.act, compile_for),
            act_dtype=activation_dtype(compile_for, config_quant.act, act_dtype),
        )
        most = DEFAULT_MAX_BATCH if max_batch is None else max_batch
        sizes, notes = _sizes(decoder, context, prefill_chunk, most)
        decoder = at_context(decoder, sizes.context)
        whole = page_tables.serves(decoder.attention_shape)
        graph_rows = plan_graphs(compile_for, cuda_graphs, sizes.max_batch, whole, notes)
        sizes = replace(sizes, pages=whole and graph_rows is not None)
        if quant_note:
            notes.append(quant_note)
        notes += range_notes(decoder, compile_for)
    if output is not None:
        check_output(output, force=force)  # before the minutes of work, not after
        check_apart(output, source.origin)
        check_linker(compile_for)
    path = as_path("the model", model)
    name = directory_name(source.origin) if path.exists() else str(model)
    if source.kind == "packed":
        notes.append("the checkpoint is packed: its own stages and scales were kept")
    converted = None
    if bits is not None and dry_run:
        refuse_dry_run()
    if (calibrate is not None or bits is not None or rotate) and not dry_run:
        with clock("convert"):
            converted = converted_path(as_path("the output", output))
            done = convert(
                model,
                converted,
                quant=asked,
                calibrate=calibrate,
                bits=bits,
                rotate=rotate,
                force=True,
                progress=progress,
                reuse=True,
            )
        notes += done.notes[1:]  # the first is the one of `settle`
        source = open_source(converted)
        config_quant, _ = source.settle(asked)
    else:
        notes += unmatched_notes(asked, phase_plans(source, config_quant))
    work = Work(name, source, config_quant, compile_for, decoder, sizes, system_lib)
    with clock("define"):
        work.define()
        notes += check_unread(source, work.params)
    report = _report(work, notes)
    if dry_run:
        report.notes += _schedule_notes(work, report)
        report.seconds = clock.seconds
        return report
    needed = report.param_bytes + OTHER_FILES_BYTES
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
        report.notes += _schedule_notes(work, report)
        with clock("compile"):
            executable = compile_module(
                work.module,
                compile_for,
                work.entry_points(),
                symbol_prefix=system_lib_prefix(system_lib) if system_lib else None,
                cuda_graphs=graph_rows,
                debug_dump=debug_dump,
                progress=progress,
            )
            functions = {name: work.signatures[name] for name in work.entry_points()}
            check_executable(executable, functions)
            library = export_library(executable, compile_for, directory, progress)
            if system_lib:
                check_objects(library, system_lib, compile_for, functions)
        with clock("finish"):
            write_configs(work, directory, written, report)
    if converted is not None:
        shutil.rmtree(converted, ignore_errors=True)
    report.output = str(output)
    report.seconds = clock.seconds
    return report


def converted_path(output: Path) -> Path:
    """Return where the packed checkpoint lies between conversion and the end of a build."""
    return output.with_name(f".{output.name}.converted")


def is_onnx(model: Any) -> bool:
    """Tell whether ``model`` names an ONNX file."""
    return isinstance(model, str | Path) and Path(model).suffix.lower() == ".onnx"


def _import_graph(model: Any, example_inputs: Any, dynamic_shapes: Any) -> Graph:
    if is_torch_module(model):
        return import_torch(model, example_inputs, dynamic_shapes)
    if example_inputs is not None or dynamic_shapes is not None:
        raise FairyError(
            "example inputs and dynamic shapes are for PyTorch modules; an ONNX file has its "
            "shapes in it, so leave them out"
        )
    path = as_path("the model", model)
    if not path.is_file():
        raise FairyError(f"no model {str(model)!r}: there is no file {path.absolute()}")
    from fairy_compile.frontends.onnx_import import import_onnx

    return import_onnx(path)


def _refuse_for_graphs(options: dict[str, Any]) -> None:
    for flag, value in options.items():
        if value is not None:
            raise FairyError(
                f"{flag} is for language models; leave it out for an ONNX or PyTorch graph"
            )


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
        scale=base.scale if scale is None else scale,
        terms=base.terms,
        act=base.act if act is None else act,
        method=method if method != "auto" else base.method,
        exempt=((exempt,) if isinstance(exempt, str) else exempt) or base.exempt,
        stages_for=base.stages_for,
    )


def _system_lib(target: Target, asked: str | None, output: str | Path | None) -> str:
    """Return what apps call the library; empty for one that is loaded from its file."""
    if target.library != "tar":
        if asked is not None:
            raise FairyError(
                f"--model-lib {asked}: a library for {target.name} is loaded from its file; only "
                "those for phones have a name of their own"
            )
        return ""
    name = asked or default_system_lib_name(as_path("the output", output or "model").resolve())
    check_system_lib_name(name)
    return name


def _sizes(
    decoder: DecoderConfig, context: int | None, prefill_chunk: int | None, max_batch: int
) -> tuple[Sizes, list[str]]:
    for flag, value in (
        ("--context", context),
        ("--prefill-chunk", prefill_chunk),
        ("--max-batch", max_batch),
    ):
        if value is not None and not (is_whole(value) and value >= 1):
            raise FairyError(f"{flag} is {value!r}; allowed: 1 and more")
    notes = []
    if context is not None and context > decoder.context:
        raise FairyError(
            f"--context {context} is more than {decoder.context}, the limit "
            f"{decoder.context_reason}"
        )
    native = decoder.rope.native_context or decoder.context
    chosen = context or min(native, decoder.context, DEFAULT_CONTEXT)
    if chosen < decoder.context and context is None:
        notes.append(
            f"context is {chosen} tokens; the model takes {decoder.context} (--context changes it)"
        )
    elif chosen == decoder.context and decoder.context_reason != "of the model":
        notes.append(f"context is {chosen} tokens, the limit {decoder.context_reason}")
    if chosen > native:
        notes.append(
            f"beyond {native} tokens the model rotates by other angles ({decoder.rope.kind}); "
            f"built for {chosen}, it does so at every length"
        )
    chunk = min(prefill_chunk or DEFAULT_PREFILL_CHUNK, chosen)
    return Sizes(chosen, chunk, max_batch), notes


def _schedule_notes(work: Work, report: BuildReport) -> list[str]:
    found = report.tuned()
    if not found.keys() & {"tuned", "near"}:
        return []
    parts = [
        f"{found.get('tuned', 0)} of {sum(found.values())} functions have knobs tuned for them",
        *([f"{found['near']} for a shape near theirs"] if "near" in found else []),
        *([f"{found['default']} have defaults"] if "default" in found else []),
    ]
    return [", ".join(parts), *work.planner.schedules.notes]


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
