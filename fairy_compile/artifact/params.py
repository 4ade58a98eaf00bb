"""`ParamWriter`: streams parameters into shard files and ``tensor-cache.json``.

Memory stays within one shard (32 MiB) plus the tensor at hand. A tensor goes to the open shard;
where the cap would be reached the shard is closed first, and a tensor of half a cap or more gets
a shard of its own (the rule of TVM's dumper). A shard is read back by nobody while it is open:
only closed shards are recorded in the progress file, so a build that was cut off goes on after
the last of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.files import FileEntry, hash_files
from fairy_compile.artifact.schema import MapOf, check, dump_json, load_object
from fairy_compile.artifact.tensor_cache import ITEMSIZE, TENSOR_CACHE, numpy_dtype, read_params
from fairy_compile.errors import ModelFileError

__all__ = ["ParamWriter", "WrittenParams", "read_params"]

SHARD_BYTES = 32 << 20
PROGRESS = "params-progress.json"

_PROGRESS_SCHEMA = {
    "shard_bytes": int,
    "shards": [{"dataPath": str, "nbytes": int, "records": [{"name": str, "nbytes": int}]}],
    "sha256": MapOf(str),
}


@dataclass(frozen=True)
class WrittenParams:
    """What `ParamWriter.finish` wrote.

    Attributes:
        tensors: number of tensors.
        bytes: their size together.
        files: shard name -> size and SHA-256, computed while writing.
    """

    tensors: int
    bytes: int
    files: dict[str, FileEntry]


class ParamWriter:
    """Writes ``params_shard_<i>.bin`` and ``tensor-cache.json`` into a directory.

    Args:
        directory: an existing directory without shards of its own; see `resume` for the others.
        shard_bytes: size a shard may reach.
    """

    def __init__(self, directory: Path | str, *, shard_bytes: int = SHARD_BYTES):
        self._directory = Path(directory)
        self._shard_bytes = shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._sha256: dict[str, str] = {}
        self._open: list[tuple[dict[str, Any], np.ndarray]] = []
        self._open_bytes = 0
        self._names: set[str] = set()

    @classmethod
    def resume(cls, directory: Path | str, *, shard_bytes: int = SHARD_BYTES) -> ParamWriter:
        """Return a writer that knows the tensors of the shards an earlier writer closed.

        Shards are hashed again first; what is damaged, unrecorded or was written with another
        ``shard_bytes`` is deleted and will be written anew. An empty directory gives an empty
        writer.
        """
        writer = cls(directory, shard_bytes=shard_bytes)
        writer._adopt_closed_shards()
        kept = writer._sha256
        for path in writer._directory.iterdir():
            if re.fullmatch(r"params_shard_\d+\.bin", path.name) and path.name not in kept:
                path.unlink()
        return writer

    def has(self, name: str) -> bool:
        """Tell whether the tensor is written, or will be when its shard closes."""
        return name in self._names

    @property
    def bytes_written(self) -> int:
        """Size of all tensors so far."""
        return sum(shard["nbytes"] for shard in self._shards) + self._open_bytes

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor, raw and little-endian.

        Args:
            name: unique name.
            array: at least one element, of a dtype in `tensor_cache.ITEMSIZE` (bfloat16 through
                ml_dtypes).

        Raises:
            ValueError: the name was used before, or shape or dtype cannot be stored.
        """
        dtype = array.dtype.name
        if name in self._names:
            raise ValueError(f"parameter {name!r} was added twice")
        if dtype not in ITEMSIZE or array.size == 0:
            raise ValueError(f"parameter {name!r} is {dtype} {array.shape}, which has no encoding")
        shape = list(array.shape)
        array = np.ascontiguousarray(array, numpy_dtype(dtype))
        record = {"name": name, "shape": shape, "dtype": dtype, "format": "raw"}
        record |= {"nbytes": array.nbytes, "byteOffset": 0}
        self._names.add(name)
        if self._open_bytes + array.nbytes >= self._shard_bytes:
            if 2 * array.nbytes >= self._shard_bytes:
                self._write_shard([(record, array)])
                return
            self._close_shard()
        record["byteOffset"] = self._open_bytes
        self._open.append((record, array.copy()))  # the caller may reuse or free its array
        self._open_bytes += array.nbytes

    def add_all(self, params: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append tensors in order, leaving out those `has` knows."""
        for name, array in params:
            if not self.has(name):
                self.add(name, array)

    def finish(self, metadata: Mapping[str, Any] | None = None) -> WrittenParams:
        """Close the last shard and write ``tensor-cache.json``.

        Args:
            metadata: members of the file's ``metadata`` besides ``ParamSize`` (tensors) and
                ``ParamBytes``; MLC also writes ``BitsPerParam``.
        """
        self._close_shard()
        total = self.bytes_written
        dump_json(
            self._directory / TENSOR_CACHE,
            {
                "metadata": {"ParamSize": len(self._names), "ParamBytes": total}
                | dict(metadata or {}),
                "records": self._shards,
            },
        )
        (self._directory / PROGRESS).unlink(missing_ok=True)
        files = {
            shard["dataPath"]: FileEntry(shard["nbytes"], self._sha256[shard["dataPath"]])
            for shard in self._shards
        }
        return WrittenParams(len(self._names), total, files)

    def _close_shard(self) -> None:
        if self._open:
            self._write_shard(self._open)
            self._open, self._open_bytes = [], 0

    def _write_shard(self, tensors: list[tuple[dict[str, Any], np.ndarray]]) -> None:
        name = f"params_shard_{len(self._shards)}.bin"
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with (self._directory / name).open("wb") as stream:
            for _, array in tensors:
                data = memoryview(array.reshape(-1).view(np.uint8))
                stream.write(data)
                md5.update(data)
                sha256.update(data)
        self._sha256[name] = sha256.hexdigest()
        self._shards.append(
            {
                "dataPath": name,
                "format": "raw-shard",
                "nbytes": sum(record["nbytes"] for record, _ in tensors),
                "records": [record for record, _ in tensors],
                "md5sum": md5.hexdigest(),
            }
        )
        self._save_progress()

    def _save_progress(self) -> None:
        progress = {
            "shard_bytes": self._shard_bytes,
            "shards": self._shards,
            "sha256": self._sha256,
        }
        new = self._directory / f"{PROGRESS}.new"
        dump_json(new, progress)
        os.replace(new, self._directory / PROGRESS)

    def _adopt_closed_shards(self) -> None:
        """Take over shards from the progress file, up to the first that is not intact."""
        try:
            progress = load_object(self._directory / PROGRESS)
        except ModelFileError:
            return  # no progress, or none that can be read: every shard is written anew
        if check(progress, _PROGRESS_SCHEMA, PROGRESS):
            return
        if progress["shard_bytes"] != self._shard_bytes:
            return
        for i, shard in enumerate(progress["shards"]):
            name = f"params_shard_{i}.bin"
            path = self._directory / name
            if shard["dataPath"] != name or not path.is_file():
                return
            digest = hash_files({name: path})[name]
            if digest != progress["sha256"].get(name):
                return
            self._shards.append(shard)
            self._sha256[name] = digest
            self._names.update(record["name"] for record in shard["records"])
