"""Reading ``tensor-cache.json`` and its shards, with every number checked before it is used.

The format is TVM's tensor cache: JSON records of shards, each shard a file of raw little-endian
row-major tensors at stated offsets. TVM's own loader trusts all of it (offsets outside the file
read or crash the process), so `load_tensor_cache` runs before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.files import resolve_inside
from fairy_compile.artifact.schema import load_object, require, show
from fairy_compile.errors import ModelFileError

TENSOR_CACHE = "tensor-cache.json"

ITEMSIZE = {
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
}
"""Dtypes of artifacts, in TVM's spelling -> bytes of an element."""

MAX_RANK = 8
MAX_DIM = 2**31 - 1
MAX_NAME = 512

_RECORD = {
    "name": str,
    "shape": [int],
    "dtype": str,
    "format": "raw",
    "nbytes": int,
    "byteOffset": int,
}
_SCHEMA = {
    "metadata": dict,
    "records": [
        {
            "dataPath": str,
            "format": "raw-shard",
            "nbytes": int,
            "md5sum": str,
            "records": [_RECORD],
        }
    ],
}


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: ``nbytes`` bytes at ``offset`` of the shard file ``path``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    nbytes: int

    def map(self) -> np.ndarray:
        """Return the tensor as a read-only memory map."""
        flat = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return flat.view(numpy_dtype(self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class TensorCache:
    """A checked tensor cache.

    Attributes:
        metadata: MLC's ``ParamSize`` and the like.
        tensors: name -> record, in file order.
        shards: shard file names relative to the artifact.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorRecord]
    shards: tuple[str, ...]


def numpy_dtype(dtype: str) -> np.dtype:
    """Return the little-endian NumPy dtype of a TVM dtype string of `ITEMSIZE`."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype).newbyteorder("<")


def check_tensor_type(name: str, shape: Iterable[int], dtype: str, where: str) -> int:
    """Check name, shape and dtype of a tensor from a file and return its size in bytes.

    Raises:
        ModelFileError: the name is empty, long or not printable; there are more than 8
            dimensions or one outside 1 .. 2^31 - 1; or the dtype is not in `ITEMSIZE`.
    """
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ModelFileError(f"{where} has a tensor with the name {show(name)}")
    if dtype not in ITEMSIZE:
        raise ModelFileError(
            f"{where}: tensor {show(name)} has dtype {show(dtype)}; allowed: {', '.join(ITEMSIZE)}"
        )
    shape = tuple(shape)
    if len(shape) > MAX_RANK or not all(1 <= dim <= MAX_DIM for dim in shape):
        raise ModelFileError(
            f"{where}: tensor {show(name)} has shape {show(list(shape))}; allowed: up to "
            f"{MAX_RANK} dimensions from 1 to {MAX_DIM}"
        )
    return math.prod(shape) * ITEMSIZE[dtype]


def load_tensor_cache(directory: Path) -> TensorCache:
    """Read ``tensor-cache.json`` of an artifact and check it against its shard files.

    Raises:
        ModelFileError: the file is malformed, a path leaves the directory, a size disagrees with
            a shape or a file, tensors overlap or leave their file, or a name appears twice.
    """
    directory = Path(directory)
    path = resolve_inside(directory, TENSOR_CACHE, str(directory))
    cache = load_object(path)
    require(cache, _SCHEMA, TENSOR_CACHE)
    tensors: dict[str, TensorRecord] = {}
    shards: set[str] = set()
    for shard in cache["records"]:
        name = shard["dataPath"]
        if name in shards:
            raise ModelFileError(f"{TENSOR_CACHE} names the shard {show(name)} twice")
        shards.add(name)
        for record in _shard_tensors(directory, shard):
            if record.name in tensors:
                raise ModelFileError(f"{TENSOR_CACHE} has two tensors named {show(record.name)}")
            tensors[record.name] = record
    return TensorCache(cache["metadata"], tensors, tuple(s["dataPath"] for s in cache["records"]))


def _shard_tensors(directory: Path, shard: dict[str, Any]) -> list[TensorRecord]:
    name = shard["dataPath"]
    path = resolve_inside(directory, name, TENSOR_CACHE)
    size = path.stat().st_size
    if shard["nbytes"] != size:
        raise ModelFileError(
            f"shard {show(name)} has {size} bytes, but {TENSOR_CACHE} says "
            f"{show(shard['nbytes'])}; the file is truncated or belongs to another build"
        )
    tensors = []
    for record in shard["records"]:
        nbytes = check_tensor_type(record["name"], record["shape"], record["dtype"], TENSOR_CACHE)
        where = f"{TENSOR_CACHE}: tensor {show(record['name'])}"
        if record["nbytes"] != nbytes:
            raise ModelFileError(
                f"{where} of shape {show(record['shape'])} {record['dtype']} takes {nbytes} bytes, "
                f"but nbytes is {show(record['nbytes'])}"
            )
        offset = record["byteOffset"]
        if not 0 <= offset <= size - nbytes:
            raise ModelFileError(
                f"{where} lies at byte {show(offset)}, outside of shard {show(name)} of {size} "
                "bytes"
            )
        tensors.append(
            TensorRecord(
                record["name"], tuple(record["shape"]), record["dtype"], path, offset, nbytes
            )
        )
    _check_overlaps(tensors)
    return tensors


def _check_overlaps(tensors: list[TensorRecord]) -> None:
    ordered = sorted(tensors, key=lambda t: t.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise ModelFileError(
                f"{TENSOR_CACHE}: tensors {show(before.name)} and {show(after.name)} overlap"
            )


def read_params(
    directory: Path | str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of an artifact's parameters as read-only memory maps.

    Args:
        directory: the artifact.
        names: which tensors, in this order; all in file order by default.

    Raises:
        ModelFileError: see `load_tensor_cache`; also if a name is not there.
    """
    cache = load_tensor_cache(Path(directory))
    for name in cache.tensors if names is None else names:
        if name not in cache.tensors:
            raise ModelFileError(f"{directory} has no parameter {name!r}")
        yield name, cache.tensors[name].map()
