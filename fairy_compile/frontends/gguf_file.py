"""A bounds-checked reader of GGUF files that holds one tensor at a time.

Format (ggml's docs/gguf.md), little-endian: the magic ``GGUF``, a 32-bit version, 64-bit numbers of
tensors and of metadata entries; the entries, each a name, a type and a value; the tensors, each a
name, a 32-bit number of dimensions, 64-bit dimensions with the one of neighbouring elements first,
a 32-bit type and a 64-bit offset; padding up to ``general.alignment``, from where offsets count.

Types of tensors have numbers that forks of ggml assign differently, so what a tensor's data are is
said by whoever reads it; here a tensor has the room up to the next one.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from fairy_compile.artifact.files import reading
from fairy_compile.errors import ModelFileError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NAME = 1 << 10
MAX_ENTRIES = 1 << 20
MAX_TEXTS = 1 << 22
"""Most texts of an array: several times the largest vocabularies."""
HEADER_LIMIT = 256 << 20
"""Most bytes of a header; vocabularies of 250,000 tokens with merges take about 10 MB."""

FLOATS = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}
"""Types of tensors of plain numbers: number -> dtype."""

# Metadata types: number -> what `struct` and NumPy both call it.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """What a header says about one tensor.

    Attributes:
        type: ggml's number of its type.
        shape: dimensions in NumPy's order, neighbouring elements last.
        offset: position of the data in the file.
        room: bytes up to the next tensor or the end of the file.
        slack: bytes of these that may lie behind the data: less than the alignment, but for the
            last tensor, behind which files may go on.
    """

    type: int
    shape: tuple[int, ...]
    offset: int
    room: int
    slack: int


class GgufFile:
    """One GGUF file whose header has been checked; data are read on demand.

    Attributes:
        path: the file.
        metadata: key -> number, text, truth value, list of texts or NumPy array.
        tensors: name -> `GgufTensor`, in the order of their data.

    Raises:
        ModelFileError: the file is damaged.
        UnsupportedError: its version or byte order is not one of those above.
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path), path.open("rb") as file:
            self._size = file.seek(0, 2)
            file.seek(0)
            self._file = file
            if (magic := self._take(4)) != MAGIC:
                raise ModelFileError(
                    f"{path} starts with {magic!r} and not with {MAGIC!r}; it is no GGUF file, or "
                    "its download was answered by something else"
                )
            self._check_version()
            tensors, entries = self._number("<Q"), self._number("<Q")
            if max(tensors, entries) > MAX_ENTRIES:
                raise self._error(f"announces {tensors} tensors and {entries} metadata entries")
            self.metadata: dict[str, Any] = {}
            for _ in range(entries):
                key = self._name(self.metadata, "metadata entry")
                self.metadata[key] = self._value(self._number("<I"), key)
            infos = {}
            for _ in range(tensors):
                name = self._name(infos, "tensor")
                infos[name] = self._tensor(name)
            end = file.tell()
            del self._file
        self.tensors = self._place(infos, end)
        for name, tensor in self.tensors.items():
            if tensor.type in FLOATS:
                self._check_room(name, math.prod(tensor.shape) * FLOATS[tensor.type].itemsize)

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path} {problem}; the file is damaged, download it again")

    def _take(self, size: int) -> bytes:
        file: BinaryIO = self._file
        at = file.tell()
        if size > min(self._size, HEADER_LIMIT) - at:
            raise self._error(
                f"has a header that goes on for {size} bytes at {at}, of {self._size} bytes and at "
                f"most {HEADER_LIMIT}"
            )
        found = file.read(size)
        if len(found) != size:
            raise self._error("ended while its header was read")
        return found

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _check_version(self) -> None:
        (version,) = struct.unpack("<I", raw := self._take(4))
        if version in VERSIONS:
            return
        if struct.unpack(">I", raw)[0] in VERSIONS:
            raise UnsupportedError(
                f"{self.path} is a GGUF file of big-endian machines; convert it with "
                "`gguf-convert-endian FILE little` of the Python package gguf"
            )
        raise UnsupportedError(
            f"{self.path} is a GGUF file of version {version}; versions read here: "
            f"{', '.join(map(str, VERSIONS))}"
        )

    def _text(self, what: str, most: int | None = None) -> str:
        size = self._number("<Q")
        if most is not None and size > most:
            raise self._error(f"has a {what} of {size} bytes; allowed: {most}")
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"has a {what} that is not UTF-8 ({error.reason})") from error

    def _name(self, known: dict[str, Any], what: str) -> str:
        name = self._text(f"name of a {what}", MAX_NAME)
        if name in known:
            raise self._error(f"has the {what} {name!r} twice")
        return name

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(f"value of {key!r}")
        if kind != _ARRAY:
            raise self._error(f"gives {key!r} a value of the unknown type {kind}")
        kind, count = self._number("<I"), self._number("<Q")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if kind != _STRING:
            raise self._error(f"gives {key!r} an array of the type {kind}")
        if count > min(MAX_TEXTS, (min(self._size, HEADER_LIMIT) - self._file.tell()) // 8):
            raise self._error(f"gives {key!r} an array of {count} texts, more than a header holds")
        return [self._text(f"text in {key!r}") for _ in range(count)]

    def _tensor(self, name: str) -> tuple[int, tuple[int, ...], int]:
        count = self._number("<I")
        if count > MAX_DIMENSIONS:
            raise self._error(f"gives {name!r} {count} dimensions; allowed: {MAX_DIMENSIONS}")
        shape = tuple(self._number("<Q") for _ in range(count))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if math.prod(shape) >= 1 << 48 or any(size >= 1 << 48 for size in shape):
            raise self._error(f"gives {name!r} the shape {shape}")
        return kind, shape, offset

    def _place(
        self, infos: dict[str, tuple[int, tuple[int, ...], int]], end: int
    ) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"has general.alignment = {alignment!r}; allowed: powers of two")
        start = -(-end // alignment) * alignment
        names = sorted(infos, key=lambda name: infos[name][2])
        offsets = [start + infos[name][2] for name in names] + [self._size]
        placed = {}
        for name, offset, then in zip(names, offsets, offsets[1:], strict=False):
            if offset > self._size or offset % alignment:
                raise self._error(
                    f"places {name!r} at {offset}, of {self._size} bytes and aligned to {alignment}"
                )
            kind, shape, _ = infos[name]
            slack = alignment - 1 if name != names[-1] else then - offset
            placed[name] = GgufTensor(kind, shape, offset, then - offset, slack)
        return placed

    def _check_room(self, name: str, size: int, *, whole: bool = False) -> None:
        info = self.tensors[name]
        if size > info.room or (whole and info.room - size > info.slack):
            raise self._error(f"has {info.room} bytes for {name!r}, which needs {size}")

    def read_bytes(
        self, name: str, shape: tuple[int, ...], *, skip: int = 0, whole: bool = False
    ) -> np.ndarray:
        """Return a copy of a tensor's bytes as uint8 of a shape.

        Args:
            name: the tensor.
            shape: how the bytes are arranged.
            skip: bytes before the first.
            whole: these are all the bytes a tensor of its type and shape has.

        Raises:
            ModelFileError: the tensor has fewer, or more where they are all.
        """
        size = math.prod(shape)
        self._check_room(name, skip + size, whole=whole)
        out = np.empty(shape, np.uint8)
        left = memoryview(out.reshape(-1))
        with reading(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.tensors[name].offset + skip)
            while left:
                got = file.readinto(left)
                if not got:
                    raise self._error(f"ended while {name!r} was read")
                left = left[got:]
        return out

    def read(self, name: str) -> np.ndarray:
        """Return a copy of a tensor of one of `FLOATS`, as it is stored.

        Raises:
            UnsupportedError: it is of another type.
        """
        info = self.tensors[name]
        if info.type not in FLOATS:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is of ggml's type {info.type}; allowed: "
                f"{', '.join(f'{n} ({d.name})' for n, d in FLOATS.items())}"
            )
        dtype = FLOATS[info.type]
        flat = self.read_bytes(name, (math.prod(info.shape) * dtype.itemsize,))
        return flat.view(dtype).reshape(info.shape)
