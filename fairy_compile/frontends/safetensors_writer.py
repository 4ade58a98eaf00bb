"""A safetensors writer that takes tensors one at a time, in any order."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from fairy_compile.frontends.safetensors_file import DTYPES

_CODES = {numpy_name: (code, size) for code, (numpy_name, size) in DTYPES.items()}

TensorLayout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (NumPy dtype name, shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor's data."""
    return math.prod(shape) * _CODES[dtype][1]


class SafetensorsWriter:
    """Writes one file whose tensors are all announced beforehand.

    The header needs every offset, so dtypes and shapes come first and data later. Wide dtypes are
    placed first, which aligns every tensor to its own element size.

    Args:
        path: the new file.
        layout: name -> (dtype, shape).
        metadata: the header's ``__metadata__``.

    Raises:
        ValueError: `add` is called with a tensor that was not announced, or `close` before every
            announced tensor was added; both are mistakes of the calling code.
    """

    def __init__(self, path: Path, layout: TensorLayout, metadata: Mapping[str, str]):
        self.path = path
        self._missing = dict(layout)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -_CODES[item[1][0]][1]):
            end = offset + tensor_bytes(dtype, shape)
            header[name] = {
                "dtype": _CODES[dtype][0],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            self._offsets[name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._start + offset)

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor."""
        given = (array.dtype.name, tuple(array.shape))
        if self._missing.get(name) != given:
            raise ValueError(f"{name}: {given} was added, {self._missing.get(name)} was announced")
        self._file.seek(self._start + self._offsets[name])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del self._missing[name]

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
        if self._missing:
            raise ValueError(f"{self.path} lacks announced tensors: {list(self._missing)[:3]}")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
