"""Checking an artifact before any of it is loaded.

`verify` finds damage and refuses malformed or hostile data files: paths, offsets, sizes, hashes,
values. It cannot make an untrusted artifact safe. The model library is native code that runs with
the rights of whoever loads it, and an artifact's own manifest vouches for it; run only libraries
that you built or whose author you trust. Files may also change between the check and the load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.contract import check_chat_config, check_library
from fairy_compile.artifact.files import HASH_THREADS, hash_files, reading, resolve_inside
from fairy_compile.artifact.graph_contract import CHAT, check_graph
from fairy_compile.artifact.manifest import MANIFEST, Manifest, ParamEntry
from fairy_compile.artifact.mlc_config import MLC_CHAT_CONFIG
from fairy_compile.artifact.schema import load_object, show
from fairy_compile.artifact.tensor_cache import (
    TENSOR_CACHE,
    TensorCache,
    TensorRecord,
    check_tensor_type,
    load_tensor_cache,
    numpy_dtype,
)
from fairy_compile.errors import ModelFileError
from fairy_compile.paths import as_path

LIBRARY_SUFFIXES = (".so", ".dylib", ".dll", ".tar", ".wasm")

_VALUES_AT_ONCE = 1 << 20
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` checked; there is no report of a bad artifact, only an error.

    Attributes:
        directory: the artifact.
        manifest: its ``fairy.json``.
        chat_config: its ``mlc-chat-config.json``; empty for a graph, which has none.
        files: number of files checked.
        bytes: their size.
        tensors: number of parameters.
        hashed: whether the SHA-256 of every file was compared.
        warnings: oddities that do not prevent loading.
    """

    directory: Path
    manifest: Manifest = field(repr=False)
    chat_config: dict[str, Any] = field(repr=False)
    files: int
    bytes: int
    tensors: int
    hashed: bool
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the summary that ``fairy_compile verify --json`` prints."""
        return {
            "directory": str(self.directory),
            "files": self.files,
            "bytes": self.bytes,
            "tensors": self.tensors,
            "hashed": self.hashed,
            "warnings": list(self.warnings),
        }


def verify(directory: Path | str, *, hashes: bool = True) -> VerifyReport:
    """Check an artifact without loading its library.

    Args:
        directory: what ``fairy_compile build`` wrote.
        hashes: also read every file and compare its SHA-256, on two threads.

    Raises:
        ModelFileError: the first thing found wrong, in one sentence.
    """
    directory = as_path("the artifact", directory)
    manifest = Manifest.load(directory)
    paths = _check_files(directory, manifest)
    cache = load_tensor_cache(directory)
    config: dict[str, Any] = {}
    if manifest.kind == CHAT:
        config = load_object(resolve_inside(directory, MLC_CHAT_CONFIG, str(directory)))
    _check_listed(manifest, cache, config)
    _check_params(manifest, cache)
    if manifest.kind == CHAT:
        _refuse(check_chat_config(config, manifest.target.device))
    _check_contract(manifest, config)
    if hashes:
        _check_hashes(directory, manifest, paths)
    with reading(directory), ThreadPoolExecutor(HASH_THREADS) as pool:
        for _ in pool.map(lambda p: _check_values(cache.tensors[p.name], p), manifest.params):
            pass
    return VerifyReport(
        directory=directory,
        manifest=manifest,
        chat_config=config,
        files=len(manifest.files) + 1,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        tensors=len(cache.tensors),
        hashed=hashes,
        warnings=tuple(_warnings(directory, manifest, config)),
    )


def check_loaded_metadata(manifest: Manifest, metadata: Mapping[str, Any]) -> None:
    """Compare what a loaded library's ``_metadata`` returns with what the manifest recorded.

    Raises:
        ModelFileError: they differ, so the parameters would be bound in a wrong order or size.
    """
    for key in manifest.metadata.keys() | metadata.keys():
        if manifest.metadata.get(key) != metadata.get(key):
            raise ModelFileError(
                f"the library {manifest.library} reports another {key!r} than {MANIFEST}; build "
                "the artifact again"
            )


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ModelFileError(problems[0] + more)


def _check_files(directory: Path, manifest: Manifest) -> dict[str, Path]:
    """Check names, presence and sizes of the listed files; return their real paths."""
    paths = {}
    for name, entry in manifest.files.items():
        if name == MANIFEST:
            raise ModelFileError(f"{MANIFEST} lists itself among its files")
        if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise ModelFileError(
                f"{MANIFEST} gives {show(name)} the sha256 {show(entry.sha256)}; expected 64 "
                "lower-case hexadecimal digits"
            )
        paths[name] = resolve_inside(directory, name, MANIFEST)
        size = paths[name].stat().st_size
        if size != entry.bytes:
            raise ModelFileError(
                f"{name} has {size} bytes, but {MANIFEST} says {show(entry.bytes)}; the file is "
                "truncated or was changed: build the artifact again"
            )
    return paths


def _check_listed(manifest: Manifest, cache: TensorCache, config: Mapping[str, Any]) -> None:
    """Check that every file another file names is covered by the manifest's sizes and hashes."""
    if not manifest.library.endswith(LIBRARY_SUFFIXES):
        raise ModelFileError(
            f"{MANIFEST} names the library {show(manifest.library)}; allowed endings: "
            f"{', '.join(LIBRARY_SUFFIXES)}"
        )
    tokenizer = config.get("tokenizer_files")
    chat = [MLC_CHAT_CONFIG] if manifest.kind == CHAT else []
    named = [manifest.library, TENSOR_CACHE, *chat, *cache.shards]
    named += tokenizer if isinstance(tokenizer, list) else []
    for name in named:
        if not isinstance(name, str) or name not in manifest.files:
            raise ModelFileError(f"{MANIFEST} does not list the file {show(name)}")


def _check_params(manifest: Manifest, cache: TensorCache) -> None:
    """Check that manifest, tensor cache and library metadata name the same parameters."""
    seen: set[str] = set()
    for param in manifest.params:
        check_tensor_type(param.name, param.shape, param.dtype, MANIFEST)
        record = cache.tensors.get(param.name)
        if param.name in seen:
            raise ModelFileError(f"{MANIFEST} lists the parameter {show(param.name)} twice")
        seen.add(param.name)
        if record is None:
            raise ModelFileError(
                f"{MANIFEST} lists the parameter {show(param.name)}, which {TENSOR_CACHE} lacks"
            )
        if (record.shape, record.dtype) != (param.shape, param.dtype):
            raise ModelFileError(
                f"parameter {show(param.name)} is {param.dtype} {show(list(param.shape))} in "
                f"{MANIFEST}, but {record.dtype} {show(list(record.shape))} in {TENSOR_CACHE}"
            )
        if param.role == "scales" and param.dtype not in _FLOATS:
            raise ModelFileError(f"the scales {show(param.name)} are {param.dtype}, not floats")
        if param.unused_bits and param.dtype in _FLOATS:
            raise ModelFileError(f"{show(param.name)} is {param.dtype} and can't have unused bits")
        bits = 8 * numpy_dtype(param.dtype).itemsize
        if not 0 <= param.unused_bits < 2**bits:
            raise ModelFileError(
                f"{MANIFEST}: {show(param.name)} has unused_bits {show(param.unused_bits)}; "
                f"allowed: a mask of {bits} bits"
            )
    if extra := sorted(cache.tensors.keys() - seen):
        raise ModelFileError(
            f"{TENSOR_CACHE} has the tensor {show(extra[0])}, which {MANIFEST} does not list"
        )


def _check_contract(manifest: Manifest, config: Mapping[str, Any]) -> None:
    """Check the recorded functions and metadata of the library against the contract of its kind."""
    if manifest.kind == CHAT:
        _refuse(
            check_library(
                manifest.functions,
                manifest.metadata,
                manifest.target.device,
                vocab_size=config["vocab_size"],
            )
        )
    else:
        _refuse(check_graph(manifest.functions, manifest.metadata))
    params = manifest.metadata["params"]
    if len(params) != len(manifest.params):
        raise ModelFileError(
            f"the library takes {len(params)} parameters, but {MANIFEST} lists "
            f"{len(manifest.params)}"
        )
    for i, (taken, param) in enumerate(zip(params, manifest.params, strict=True)):
        if (taken["name"], taken["dtype"]) != (param.name, param.dtype) or not _same_shape(
            taken["shape"], param.shape, config
        ):
            raise ModelFileError(
                f"the library takes as parameter {i} {show(taken['name'])} {show(taken['dtype'])} "
                f"{show(taken['shape'])}, but {MANIFEST} lists {show(param.name)} "
                f"{param.dtype} {show(list(param.shape))}"
            )


def _same_shape(taken: list[Any], shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    # A symbolic dimension stands for a top-level value of mlc-chat-config.json.
    return [config.get(dim) if isinstance(dim, str) else dim for dim in taken] == list(shape)


def _check_hashes(directory: Path, manifest: Manifest, paths: Mapping[str, Path]) -> None:
    with reading(directory):
        digests = hash_files(paths)
    for name, digest in digests.items():
        if digest != manifest.files[name].sha256:
            raise ModelFileError(
                f"{name} does not have the sha256 {MANIFEST} records; it is damaged or was "
                "changed: build the artifact again"
            )


def _check_values(record: TensorRecord, param: ParamEntry) -> None:
    """Check the values of scales and codes, a megabyte at a time and without a memory map.

    A map would crash the process if another one truncated the file meanwhile.
    """
    role, unused_bits = param.role, param.unused_bits
    if role != "scales" and not unused_bits:
        return
    dtype = numpy_dtype(record.dtype)
    mask = np.array(unused_bits).astype(f"u{dtype.itemsize}")
    with record.path.open("rb") as stream:
        stream.seek(record.offset)
        left = record.nbytes // dtype.itemsize
        while left:
            values = np.fromfile(stream, dtype, min(left, _VALUES_AT_ONCE))
            if not values.size:
                raise ModelFileError(f"{record.path.name} was truncated while it was read")
            left -= values.size
            if role == "scales":
                values = values.astype(np.float32)
                if not (np.isfinite(values) & (values > 0)).all():
                    raise ModelFileError(
                        f"the scales {show(record.name)} hold a value that is not finite and "
                        "positive"
                    )
            elif (values.view(mask.dtype) & mask).any():
                raise ModelFileError(
                    f"the codes {show(record.name)} have bits set outside of "
                    f"{~unused_bits & (2 ** (8 * dtype.itemsize) - 1):#x}"
                )


def _warnings(directory: Path, manifest: Manifest, config: Mapping[str, Any]) -> list[str]:
    found = []
    recorded = {"apache-tvm": manifest.tvm, "apache-tvm-ffi": manifest.tvm_ffi}
    for package, version in recorded.items():
        installed = _installed(package)
        if version != installed:
            found.append(
                f"the artifact was built with {package} {show(version)}, installed is {installed}"
            )
    if manifest.kind == CHAT and not config["tokenizer_files"]:
        found.append("the artifact has no tokenizer; it takes and gives token ids only")
    listed = {MANIFEST, *manifest.files}
    extra = sorted(p.name for p in directory.iterdir() if p.is_file() and p.name not in listed)
    if extra:
        found.append(f"{len(extra)} files are not part of the artifact, e.g. {show(extra[0])}")
    return found


def _installed(package: str) -> str:
    try:
        return package_metadata.version(package)
    except package_metadata.PackageNotFoundError:
        return "none"
