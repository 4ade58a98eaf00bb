"""Writing an artifact: the parameters, then the files that describe them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, Protocol

from fairy_compile.artifact import (
    EngineSizes,
    LayerEntry,
    Manifest,
    ModelInfo,
    ParamEntry,
    ParamWriter,
    Signature,
    Source,
    TargetInfo,
    WrittenParams,
    chat_config,
    check_chat_config,
    check_library,
    copy_tokenizer_files,
    describe_files,
    signatures_of,
)
from fairy_compile.artifact.contract import OPTIONAL_FUNCTIONS, PAGE_FUNCTIONS
from fairy_compile.artifact.graph_contract import CHAT
from fairy_compile.artifact.mlc_config import MLC_CHAT_CONFIG
from fairy_compile.artifact.schema import dump_json, load_object
from fairy_compile.artifact.tensor_cache import ITEMSIZE, TENSOR_CACHE
from fairy_compile.compiler import params as parameters
from fairy_compile.compiler.cuda_binary import archs
from fairy_compile.compiler.export import library_name
from fairy_compile.compiler.library import Param, Sizes, define, entry_points
from fairy_compile.compiler.pipeline import Progress
from fairy_compile.compiler.plan import Planner
from fairy_compile.compiler.report import BuildReport, describe_call
from fairy_compile.config import QuantConfig
from fairy_compile.errors import UnsupportedError
from fairy_compile.frontends.source import ModelSource
from fairy_compile.models import DecoderConfig
from fairy_compile.targets import Target
from fairy_compile.tvm_pair import TVM_PAIR

OTHER_FILES_BYTES = 64 << 20
"""Room for the library, tokenizer and JSON files beside the parameters."""


@dataclass
class Work:
    """The pieces a build passes along; ``name`` is the directory's last part or the hub id.

    ``system_lib`` is what apps call the library, see `Manifest`.
    """

    name: str
    source: ModelSource
    quant: QuantConfig
    target: Target
    decoder: DecoderConfig
    sizes: Sizes
    system_lib: str = ""

    def define(self, demands: parameters.Demands | None = None) -> None:
        """Plan kernels and build the Relax module."""
        act_dtype = self.decoder.act_dtype
        self.planner = Planner(self.source, self.quant, self.target, demands, act_dtype)
        self.module, self.params, self.metadata = define(
            self.decoder, self.planner, self.target, self.sizes, f"fairy-{self.quant.quant}"
        )
        _check_buffers(self.params, self.target)
        self.signatures = signatures_of(self.module)
        problems = check_library(
            self.signatures, self.metadata, self.target.device, self.decoder.vocab_size
        )
        if problems:
            raise RuntimeError("the library breaks the engine's contract: " + "; ".join(problems))

    def entry_points(self) -> list[str]:
        """Return what engines call in this library, see `library.entry_points`."""
        optional = dict.fromkeys([*OPTIONAL_FUNCTIONS, *PAGE_FUNCTIONS])
        return [*entry_points(self.target), *(n for n in optional if n in self.signatures)]

    def resume_key(self) -> str:
        """Return what identifies the result: inputs, options, target and versions."""
        origin = self.source.origin
        files = {
            p.name: [p.stat().st_size, p.stat().st_mtime_ns]
            for p in (sorted(origin.iterdir()) if origin.is_dir() else [origin])
            if p.is_file()
        }
        facts = [
            str(origin.resolve()),
            files,
            self.quant.to_json(),
            self.target.name,
            str(self.target.to_tvm()),
            [[p.name, p.shape, p.dtype] for p in self.params],
            [self.sizes.context, self.sizes.prefill_chunk, self.sizes.max_batch, self.sizes.pages],
            self.decoder.kv_dtype,
            self.decoder.act_dtype,
            TVM_PAIR,
            package_metadata.version("fairy-compile"),
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def param_nbytes(param: Param) -> int:
    """Return the stored size of a parameter in bytes."""
    size = ITEMSIZE[param.dtype]
    for dim in param.shape:
        size *= dim
    return size


def _check_buffers(params: list[Param], target: Target) -> None:
    most = target.limits.buffer_bytes if target.limits else None
    for param in params:
        size = param_nbytes(param)
        if most is not None and size > most:
            raise UnsupportedError(
                f"parameter {param.name} takes {size} bytes; an array on target {target.name} has "
                f"at most {most}; a smaller model or fewer --exempt layers fit"
            )


# Beside the shards of an unfinished build: what the weights written so far demand.
_DEMANDS = "demands-progress.json"


class AnyWork(Protocol):
    """What a build passes along, of a chat model (`Work`) or of a graph."""

    source: Any
    quant: QuantConfig
    target: Target
    planner: Planner
    params: list[Param]
    metadata: dict[str, Any]
    signatures: dict[str, Signature]
    system_lib: str


def write_params(
    work: AnyWork, directory: Path, progress: Progress | None
) -> tuple[WrittenParams, parameters.Demands]:
    """Write shards and ``tensor-cache.json``, going on where an interrupted build stopped.

    Returns:
        (what was written, what the weights demand of their kernels).
    """
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
    bits = 8 * sum(param_nbytes(p) for p in work.params if p.call) / max(1, weights)
    return writer.finish({"BitsPerParam": round(bits, 3)}), demands


def write_configs(work: Work, directory: Path, written: WrittenParams, report: BuildReport) -> None:
    """Write tokenizer files, ``mlc-chat-config.json`` and ``fairy.json``; fill in the report."""
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
    manifest = manifest_of(
        work,
        directory,
        written,
        report,
        kind=CHAT,
        model=ModelInfo(work.decoder.model_type, _model_sizes(work.decoder) | report.sizes),
        others=[*tokenizer, MLC_CHAT_CONFIG],
        functions=work.entry_points(),
    )
    manifest.write(directory)
    report.files = {name: entry.bytes for name, entry in manifest.files.items()}


def manifest_of(
    work: AnyWork,
    directory: Path,
    written: WrittenParams,
    report: BuildReport,
    *,
    kind: str,
    model: ModelInfo,
    others: Sequence[str],
    functions: Sequence[str],
) -> Manifest:
    """Return the manifest of a finished directory.

    Args:
        work: what was built.
        directory: where it lies.
        written: its parameters.
        report: of the build.
        kind: of the artifact, see `Manifest`.
        model: family and sizes.
        others: files besides library and parameters.
        functions: the library's public functions.
    """
    library = library_name(work.target)
    names = [*others, *written.files, TENSOR_CACHE, library]
    return Manifest(
        fairy_compile=package_metadata.version("fairy-compile"),
        tvm=TVM_PAIR["apache-tvm"],
        tvm_ffi=TVM_PAIR["apache-tvm-ffi"],
        source=Source(work.source.kind, report.model, dict(work.source.sha256())),
        quant=work.quant.to_json(),
        target=TargetInfo(
            work.target.name,
            work.target.device,
            str(work.target.to_tvm()),
            tuple(sorted(work.target.features)),
            archs(work.target) if work.target.device == "cuda" else (),
        ),
        model=model,
        files=describe_files(directory, names, known=written.files),
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
                act=row.act,
                parts=row.parts,
                demands=row.demands,
            )
            for row in report.layers
        ),
        params=tuple(ParamEntry(p.name, p.shape, p.dtype, parameters.role(p)) for p in work.params),
        library=library,
        system_lib=work.system_lib,
        functions={name: str(work.signatures[name]) for name in functions},
        metadata=work.metadata,
        kind=kind,
    )


def _model_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_layers": decoder.num_layers,
        "num_heads": decoder.num_heads,
        "num_kv_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
    }
