"""Weights in host memory: read once, in place, on huge pages where the system has them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.tensor_cache import TensorRecord, load_tensor_cache
from fairy_compile.errors import ModelFileError
from fairy_compile.runtime.host_memory import allocate_parts

# Reading is bound by the copy out of the page cache, which two threads saturate.
READERS = 2


def load_host_weights(directory: Path, names: Sequence[str]) -> list[Any]:
    """Read the named tensors of an artifact into one block of memory.

    Args:
        directory: an artifact that passed `fairy_compile.verify`.
        names: tensors in the order wanted.

    Returns:
        One `tvm.runtime.Tensor` on the CPU per name; together they keep the block alive.

    Raises:
        ModelFileError: a tensor is missing, or a shard changed while it was read.
    """
    records = load_tensor_cache(directory).tensors
    missing = [name for name in names if name not in records]
    if missing:
        raise ModelFileError(f"{directory} has no tensor {missing[0]!r}; build the model again")
    wanted = [records[name] for name in names]
    parts = allocate_parts([record.nbytes for record in wanted])
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(_read, wanted, parts))
    return [_tensor(record, part) for record, part in zip(wanted, parts, strict=True)]


def _read(record: TensorRecord, into: np.ndarray) -> None:
    with record.path.open("rb", buffering=0) as file:
        file.seek(record.offset)
        view, done = memoryview(into), 0
        while done < record.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise ModelFileError(f"{record.path} became shorter while it was read")
            done += count


def _tensor(record: TensorRecord, data: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.from_dlpack(data)._create_view(record.shape, record.dtype)
