"""`inspect`: what is inside an artifact or a packed checkpoint, as data and as a table."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairy_compile.artifact.files import human_bytes, reading
from fairy_compile.artifact.graph_contract import CHAT
from fairy_compile.artifact.manifest import MANIFEST, Manifest
from fairy_compile.artifact.schema import load_object
from fairy_compile.errors import ModelFileError
from fairy_compile.layer_table import printable, render_layers
from fairy_compile.paths import as_path

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class LayerRow:
    """One layer or fused call.

    Attributes:
        name: layer name.
        shape: (out_features, in_features).
        stages: T, 0 for a dense layer.
        terms: ``UW``, ``W`` or empty.
        scale: granularity, or empty.
        bits_per_weight: stored bits, padding and scales included, over out * in weights.
        kernel: kernel family; ``""`` in a checkpoint.
        bytes: stored size.
        reason: why it is stored or computed this way.
    """

    name: str
    shape: tuple[int, ...]
    stages: int
    terms: str
    scale: str
    bits_per_weight: float
    kernel: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class FileRow:
    """One file; ``sha256`` is empty where none is recorded."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        kind: ``artifact``, ``graph artifact`` or ``packed checkpoint``.
        directory: what was inspected.
        header: title -> value: model, target, versions, sizes.
        layers: one row a layer.
        files: one row a file.
    """

    kind: str
    directory: str
    header: dict[str, Any]
    layers: tuple[LayerRow, ...]
    files: tuple[FileRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def inspect(directory: Path | str) -> Inspection:
    """Read what an artifact or a packed checkpoint says about itself; loads no weights.

    Use `verify` to learn whether it is true.

    Raises:
        ModelFileError: the directory is neither, or its description is malformed.
    """
    directory = as_path("the artifact", directory)
    with reading(directory):
        artifact = (directory / MANIFEST).exists()
        model = (directory / "config.json").is_file()
    if artifact:
        return _inspect_artifact(directory)
    if model:
        config = load_object(directory / "config.json")
        quantization = config.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == "fairy":
            return _inspect_packed(directory)
    if directory.suffix.lower() == ".gguf" and directory.is_file():
        raise ModelFileError(
            f"{directory} is a model, and neither an artifact nor a packed checkpoint; "
            f"`fairy_compile build {shlex.quote(str(directory))} --dry-run` lists its layers"
        )
    raise ModelFileError(
        f"{directory} is neither an artifact (no {MANIFEST}) nor a packed checkpoint (no "
        "config.json with quant_method fairy); name what `fairy_compile build` or `convert` wrote"
    )


def _inspect_artifact(directory: Path) -> Inspection:
    manifest = Manifest.load(directory)
    rows = tuple(
        _layer_row(
            entry.name,
            entry.shape,
            entry.stages,
            entry.terms,
            entry.scale,
            entry.kernel,
            entry.bytes,
            entry.reason,
        )
        for entry in manifest.layers
    )
    files = tuple(FileRow(name, e.bytes, e.sha256) for name, e in manifest.files.items())
    header = {
        "model": manifest.model.family,
        "source": f"{manifest.source.name} ({manifest.source.kind})",
        "target": f"{manifest.target.name} ({manifest.target.device})",
        "quantisation": _quant_text(manifest.quant),
        "fairy_compile": manifest.fairy_compile,
        "apache-tvm": f"{manifest.tvm}, ffi {manifest.tvm_ffi}",
        "created": manifest.created,
        "library": manifest.library,
        **manifest.model.sizes,
        "layers": human_bytes(sum(row.bytes for row in rows)),
        "total": human_bytes(sum(file.bytes for file in files)),
    }
    kind = "artifact" if manifest.kind == CHAT else f"{manifest.kind} artifact"
    return Inspection(kind, str(directory), header, rows, files)


def _inspect_packed(directory: Path) -> Inspection:
    from fairy_compile.config import QuantConfig
    from fairy_compile.frontends import open_source
    from fairy_compile.frontends.store import TensorStore

    source = open_source(directory)
    quant = source.quant or QuantConfig()
    stored = {
        name: math.prod(info.shape) * _itemsize(info.dtype)
        for name, info in TensorStore.open(directory).infos.items()
    }
    rows = []
    for name in source.names():
        layer, shape = name.removesuffix(".weight"), source.shape(name)
        if layer == name or len(shape) != 2:
            continue
        plan = source.plan(layer, quant)
        parts = [f"{layer}.codes", f"{layer}.scales"] if plan.phase else [name]
        size = sum(stored[part] for part in parts)
        rows.append(
            _layer_row(
                layer, shape, plan.stages, "".join(plan.terms), plan.scale, "", size, plan.reason
            )
        )
    files = tuple(
        FileRow(path.name, path.stat().st_size, "")
        for path in sorted(directory.iterdir())
        if path.is_file()
    )
    config = source.config
    header = {
        "model": config.get("model_type", "unknown"),
        "quantisation": _quant_text(quant.to_json()),
        **{key: config[key] for key in _SIZES if key in config},
        "layers": human_bytes(sum(row.bytes for row in rows)),
        "total": human_bytes(sum(file.bytes for file in files)),
    }
    return Inspection("packed checkpoint", str(directory), header, tuple(rows), files)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _itemsize(dtype: str) -> int:
    from fairy_compile.artifact.tensor_cache import numpy_dtype

    return numpy_dtype(dtype).itemsize


def _layer_row(
    name: str,
    shape: tuple[int, ...],
    stages: int,
    terms: str,
    scale: str,
    kernel: str,
    size: int,
    reason: str,
) -> LayerRow:
    weights = math.prod(shape)
    bits = round(8 * size / weights, 3) if weights > 0 else 0.0
    return LayerRow(name, tuple(shape), stages, terms, scale, bits, kernel, size, reason)


def _quant_text(quant: dict[str, Any]) -> str:
    parts = [f"{key} {quant[key]}" for key in ("scale", "act", "method") if key in quant]
    return ", ".join([str(quant.get("quant", "unknown")), *parts])


def render(inspection: Inspection, console: Console) -> None:
    """Print an inspection as a header, a table of layers and a table of files."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    def cell(value: Any) -> str:
        return escape(printable(str(value)))

    console.print(f"[bold]{cell(inspection.directory)}[/bold] ({inspection.kind})")
    header = Table.grid(padding=(0, 2))
    for title, value in inspection.header.items():
        header.add_row(cell(title), cell(value))
    console.print(header)
    render_layers(
        console,
        ("shape", "codes", "bits", "bytes", "kernel"),
        (
            (
                row.name,
                (
                    "x".join(map(str, row.shape)),
                    f"{row.stages} {row.terms} {row.scale}" if row.stages else "-",
                    f"{row.bits_per_weight:.2f}",
                    human_bytes(row.bytes),
                    row.kernel or "-",
                ),
                row.reason,
            )
            for row in inspection.layers
        ),
    )
    files = Table("file", box=box.SIMPLE_HEAD, pad_edge=False)
    files.add_column("bytes", justify="right")
    files.add_column("sha256")
    for file in inspection.files:
        files.add_row(cell(file.name), human_bytes(file.bytes), cell(file.sha256[:16] or "-"))
    console.print(files)
