"""A bounds-checked reader of safetensors files that holds one tensor at a time.

Format (huggingface.co/docs/safetensors): an unsigned 64-bit little-endian header length N, N bytes
of JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``,
then the data that the offsets count in. The tensors must cover the data without gap or overlap.

Tensors are read with plain reads into memory of their own: nothing is mapped, so nothing of the
file stays resident, and a file that shrinks while it is read is an error and not a bus fault.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fairy_compile.artifact.files import reading
from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.files import parse_json_object

HEADER_LIMIT = 32 << 20
MAX_DIMENSIONS = 8

# safetensors name -> (NumPy name, bytes per element). All of them are accepted in a header;
# what a tensor may be used for is the caller's decision.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        dtype: NumPy name, e.g. ``"bfloat16"``.
        shape: dimensions.
        nbytes: size of the data.
        offset: position of the data in its file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of a name, `ml_dtypes` included."""
    return np.dtype(getattr(ml_dtypes, name) if name.startswith(("bfloat", "float8")) else name)


class SafetensorsFile:
    """One safetensors file whose header has been checked; data is read on demand.

    Attributes:
        path: the file.
        tensors: name -> `TensorInfo`, in the order of their data.
        metadata: the header's ``__metadata__``.
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path), path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise self._error(f"is {size} bytes long, too short for a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > size - 8:
                raise self._error(
                    f"announces a header of {length} bytes but only {size - 8} follow"
                )
            if length > HEADER_LIMIT:
                raise self._error(f"has a header of {length} bytes; allowed: {HEADER_LIMIT}")
            text = file.read(length)
        header = parse_json_object(text, f"the header of {path}")
        self.metadata = self._check_metadata(header.pop("__metadata__", {}))
        start = 8 + length
        infos = {name: self._check_entry(name, entry, start) for name, entry in header.items()}
        self.tensors = dict(
            sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        )
        self._check_cover(start, size)

    def _error(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path} {problem}; the file is damaged, download it again")

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._error("has a __metadata__ that is not a map of text to text")
        return metadata

    def _check_entry(self, name: str, entry: Any, start: int) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"describes {name!r} without exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(DTYPES)}"
            )
        if not _is_int_list(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._error(
                f"gives {name!r} the shape {shape!r:.80}; allowed: at most {MAX_DIMENSIONS} "
                "non-negative integers"
            )
        if not _is_int_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"gives {name!r} the data_offsets {offsets!r:.80}")
        numpy_name, itemsize = DTYPES[dtype]
        nbytes = math.prod(shape) * itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise self._error(
                f"stores {offsets[1] - offsets[0]} bytes for {name!r}, but {dtype} "
                f"{tuple(shape)} needs {nbytes}"
            )
        return TensorInfo(numpy_name, tuple(shape), nbytes, start + offsets[0])

    def _check_cover(self, start: int, size: int) -> None:
        end = start
        for name, info in self.tensors.items():
            if info.offset != end:
                kind = "overlaps the tensor before it" if info.offset < end else "leaves a gap"
                raise self._error(f"has data_offsets of {name!r} at which the data {kind}")
            end += info.nbytes
        if end > size:
            raise self._error(f"is truncated: its tensors need {end} bytes and it has {size}")
        if end < size:
            raise self._error(f"has {size - end} bytes that belong to no tensor")

    def read(self, name: str) -> np.ndarray:
        """Return a copy of the tensor ``name`` in its stored dtype.

        Raises:
            ModelFileError: the file has become shorter since it was opened.
        """
        info = self.tensors[name]
        out = np.empty(info.shape, numpy_dtype(info.dtype))
        left = memoryview(out.reshape(-1).view(np.uint8))
        with self.path.open("rb", buffering=0) as file:
            file.seek(info.offset)
            while left:
                got = file.readinto(left)  # the system may give less than asked for, 2 GiB at most
                if not got:
                    raise self._error(f"ended while {name!r} was read")
                left = left[got:]
        return out


def _is_int_list(value: Any) -> bool:
    # bool is an int to Python but not to JSON; 2**63 bounds what products and seeks can become.
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 1 << 63 for i in value)
