"""Weights in host memory: read once, in place, on huge pages where the system has them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.tensor_cache import TensorRecord, load_tensor_cache
from fairy_compile.errors import ModelFileError

# Compiled functions may use aligned loads of a whole cache line.
ALIGNMENT = 64
# Reading is bound by the copy out of the page cache, which two threads saturate.
READERS = 2


def load_host_weights(directory: Path, names: Sequence[str]) -> list[Any]:
    """Read the named tensors of an artifact into one block of memory.

    Decoding streams all weights once per token, so translation misses cost several per cent on
    4 KiB pages; the block asks for huge ones (transparent huge pages on Linux).

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
    offsets = _offsets(wanted)
    block = _allocate(offsets[-1])
    jobs = list(zip(wanted, offsets, strict=False))
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda job: _read(job[0], block[job[1] : job[1] + job[0].nbytes]), jobs))
    return [_tensor(record, block[at : at + record.nbytes]) for record, at in jobs]


def _offsets(records: Iterable[TensorRecord]) -> list[int]:
    """Return the aligned start of each tensor in the block, then the size of the block."""
    offsets = [0]
    for record in records:
        offsets.append(-(-(offsets[-1] + record.nbytes) // ALIGNMENT) * ALIGNMENT)
    return offsets


def _allocate(nbytes: int) -> np.ndarray:
    """Return zeroed bytes on a page boundary, on huge pages if the system gives them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)
    # Private, because shared anonymous memory gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(nbytes, 1), flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


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
