"""``fairy.json``: what an artifact is, from what it was built, and how.

MLC engines ignore this file. Our tools check the rest of the directory against it before anything
is loaded, see `artifact.verify`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fairy_compile.artifact.files import FileEntry, reading, resolve_inside
from fairy_compile.artifact.graph_contract import CHAT, GRAPH, KINDS
from fairy_compile.artifact.schema import MapOf, OneOf, dump_json, load_object, require, show
from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.paths import as_path

MANIFEST = "fairy.json"
FORMAT_VERSION = 1

_SCHEMA = {
    "format_version": int,
    "fairy_compile": str,
    "tvm": str,
    "tvm_ffi": str,
    "created": str,
    "source": {"kind": str, "name": str, "files": MapOf(str)},
    "quant": dict,
    "target": {"name": str, "device": str, "tvm": str, "features": [str], "archs?": [str]},
    "model": {"family": str, "sizes": dict},
    "files": MapOf({"bytes": int, "sha256": str}),
    "layers": [
        {
            "name": str,
            "kernel": str,
            "layout": str,
            "bytes": int,
            "reason": str,
            "stages": int,
            "terms": str,
            "scale": str,
            "shape": [int],
            "act?": str,
            "parts?": [int],
            "demands?": dict,
        }
    ],
    "params": [{"name": str, "shape": [int], "dtype": str, "role": str, "unused_bits": int}],
    "library": str,
    "system_lib?": str,
    "functions": MapOf(str),
    "metadata": dict,
    "kind?": OneOf(*KINDS),
}


@dataclass(frozen=True)
class Source:
    """What the artifact was built from.

    Attributes:
        kind: e.g. ``huggingface`` or ``packed``.
        name: last part of the directory, or the hub id; never an absolute path.
        files: name -> SHA-256 of the files that were read.
    """

    kind: str
    name: str
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if re.match(r"[/\\~]|[A-Za-z]:[/\\]", self.name):
            raise ModelFileError(
                f"the source is called {show(self.name)}; allowed: a directory's last part or a "
                "hub id"
            )


@dataclass(frozen=True)
class TargetInfo:
    """The target an artifact was built for.

    Attributes:
        name: what ``--target`` took.
        device: TVM device name, ``cpu``; picks the function contract.
        tvm: the full TVM target as text.
        features: instruction-set features the library may use, in LLVM's names.
        archs: GPU architectures the library has machine code for, e.g. ``sm_90a``; CUDA only.
    """

    name: str
    device: str
    tvm: str
    features: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """Model family (``llama``) and its sizes, e.g. ``{"vocab_size": 32000}``."""

    family: str
    sizes: dict[str, Any]


@dataclass(frozen=True)
class LayerEntry:
    """One row of the build report.

    Attributes:
        name: layer, or the fused call, by its checkpoint name.
        kernel: kernel family, e.g. ``x86.codebook``, or ``dense``.
        layout: packed form of the weight.
        bytes: stored size.
        reason: why this kernel.
        stages: T; 0 for a dense layer.
        terms: ``UW``, ``W``, or empty for a dense layer.
        scale: granularity of the scales; empty for a dense layer.
        shape: (out_features, in_features) of the real map.
        act: activation contract; empty in artifacts of earlier versions, as are those below.
        parts: complex output rows of each fused layer.
        demands: knobs of the kernel that the weights need.
    """

    name: str
    kernel: str
    layout: str
    bytes: int
    reason: str
    stages: int
    terms: str
    scale: str
    shape: tuple[int, ...]
    act: str = ""
    parts: tuple[int, ...] = ()
    demands: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParamEntry:
    """One parameter of the library, in argument order.

    Attributes:
        name: name in ``tensor-cache.json``.
        shape: dimensions.
        dtype: TVM dtype string.
        role: ``scales`` must be finite and positive; ``codes`` must keep ``unused_bits`` clear;
            others (``weight``, ``norm``, ``bias``, ``embedding``, ``table``) are free.
        unused_bits: mask of the bits in every element that the layout leaves at zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str = "weight"
    unused_bits: int = 0


@dataclass(frozen=True)
class Manifest:
    """The contents of ``fairy.json``.

    Attributes:
        fairy_compile: version of this package.
        tvm: version of apache-tvm the library was compiled with.
        tvm_ffi: version of apache-tvm-ffi.
        source: what was built.
        quant: `QuantConfig.to_json()`.
        target: for what.
        model: family and sizes.
        files: every file of the artifact but ``fairy.json``.
        layers: the build report.
        params: parameters in the order the library takes them.
        library: file name of the model library.
        system_lib: what an app that links the library calls it (``system://NAME``); empty for one
            that is loaded from its file.
        functions: name -> signature of the library's public functions, see `artifact.contract`.
        metadata: what the library's ``_metadata`` function returns.
        created: UTC, ISO 8601.
        kind: ``chat``, an MLC model directory, of which the file says nothing, or ``graph``, see
            `artifact.graph_contract`.
    """

    fairy_compile: str
    tvm: str
    tvm_ffi: str
    source: Source
    quant: dict[str, Any]
    target: TargetInfo
    model: ModelInfo
    files: dict[str, FileEntry]
    layers: tuple[LayerEntry, ...]
    params: tuple[ParamEntry, ...]
    library: str
    functions: dict[str, str]
    metadata: dict[str, Any]
    system_lib: str = ""
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    kind: str = CHAT

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `from_json` reads."""
        value = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.kind == CHAT:
            del value["kind"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = MANIFEST) -> Manifest:
        """Read the JSON object of a manifest.

        Raises:
            ModelFileError: another format version, or a member is missing or of a wrong type.
        """
        version = value.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ModelFileError(
                f"{where} has format_version {show(version)}; this fairy_compile reads "
                f"{FORMAT_VERSION}: build the artifact again or install the version that wrote it"
            )
        require(value, _SCHEMA, where)
        keys = [key.removesuffix("?") for key in _SCHEMA if key != "format_version"]
        members = {key: value[key] for key in keys if key in value}
        return cls(
            **members
            | {
                "source": Source(**_known(Source, value["source"])),
                "target": TargetInfo(**_known(TargetInfo, value["target"])),
                "model": ModelInfo(**_known(ModelInfo, value["model"])),
                "files": {
                    name: FileEntry(entry["bytes"], entry["sha256"])
                    for name, entry in value["files"].items()
                },
                "layers": tuple(LayerEntry(**_known(LayerEntry, row)) for row in value["layers"]),
                "params": tuple(ParamEntry(**_known(ParamEntry, row)) for row in value["params"]),
            }
        )

    @classmethod
    def load(cls, directory: Path | str) -> Manifest:
        """Read ``fairy.json`` of an artifact.

        Raises:
            ModelFileError: see `from_json`; also if there is no such directory or file, or it
                cannot be read.
        """
        directory = as_path("the artifact", directory)
        with reading(directory):
            is_directory, exists = directory.is_dir(), (directory / MANIFEST).exists()
        if not is_directory:
            raise ModelFileError(
                f"{directory} is no directory; name one that `fairy_compile build` wrote"
            )
        if not exists:
            raise ModelFileError(
                f"{directory} has no {MANIFEST}; name a directory that `fairy_compile build` wrote"
            )
        return cls.from_json(load_object(resolve_inside(directory, MANIFEST, str(directory))))

    def check_language_model(self, directory: Path | str) -> None:
        """Check that the artifact in ``directory``, whose manifest this is, continues text.

        Raises:
            UnsupportedError: it is a graph.
        """
        if self.kind == GRAPH:
            raise UnsupportedError(
                f"{directory} is a compiled graph ({self.model.family}), not a language model; run "
                f"it from Python: fairy_compile.load({str(directory)!r}).run(inputs)"
            )

    def write(self, directory: Path | str) -> None:
        """Write ``fairy.json`` into ``directory``."""
        dump_json(Path(directory) / MANIFEST, self.to_json())


def _known(cls: type, row: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the fields of dataclass ``cls``; JSON arrays become tuples."""
    return {
        name: tuple(row[name]) if isinstance(row[name], list) else row[name]
        for name in cls.__dataclass_fields__
        if name in row
    }
