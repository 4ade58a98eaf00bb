"""Tensors of an ONNX model: where they lie, checked, and their data."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from fairy_compile.artifact.files import path_problem
from fairy_compile.errors import ModelFileError
from fairy_compile.frontends.files import member

if TYPE_CHECKING:
    import onnx


class TensorReader:
    """Reads tensors of one model, from its message or from external data files.

    Attributes:
        files: external data files that tensors lie in.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: dict[Path, None] = {}

    def dtype(self, tensor: onnx.TensorProto) -> str:
        """Return the name of the tensor's dtype."""
        from onnx import helper

        try:
            return str(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        except (KeyError, ValueError) as error:
            raise ModelFileError(
                f"{self._path}: tensor {tensor.name!r} has the unknown data type {tensor.data_type}"
            ) from error

    def check(self, tensor: onnx.TensorProto) -> None:
        """Check a tensor's dimensions and where its data lies.

        Raises:
            ModelFileError: see `read_onnx`.
        """
        if any(dim < 0 for dim in tensor.dims):
            raise ModelFileError(
                f"{self._path}: tensor {tensor.name!r} has the shape {list(tensor.dims)}"
            )
        if tensor.data_location == tensor.EXTERNAL:
            self._extent(tensor)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != self._nbytes(tensor):
            raise ModelFileError(
                f"{self._path}: tensor {tensor.name!r} of shape {list(tensor.dims)} has "
                f"{len(tensor.raw_data)} bytes; expected {self._nbytes(tensor)}"
            )

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """Return the tensor's data."""
        from onnx import numpy_helper

        if tensor.data_location == tensor.EXTERNAL:
            return np.frombuffer(self.bytes(tensor), np.dtype(self.dtype(tensor))).reshape(
                tuple(tensor.dims)
            )
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ModelFileError(
                f"{self._path}: tensor {tensor.name!r} cannot be read: {error}"
            ) from error

    def bytes(self, tensor: onnx.TensorProto) -> bytes:
        """Return the bytes of a tensor whose data is external."""
        file, offset, nbytes = self._extent(tensor)
        with file.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(nbytes)
        if len(data) != nbytes:
            raise ModelFileError(f"{file} became shorter while it was read")
        return data

    def _nbytes(self, tensor: onnx.TensorProto) -> int:
        from onnx import TensorProto

        # Types narrower than a byte are packed, the last byte filled up.
        bits = {TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4}
        bits |= {getattr(TensorProto, name, -1): 2 for name in ("UINT2", "INT2")}
        count = math.prod(tensor.dims)
        if tensor.data_type in bits:
            return -(-count * bits[tensor.data_type] // 8)
        return count * np.dtype(self.dtype(tensor)).itemsize

    def _extent(self, tensor: onnx.TensorProto) -> tuple[Path, int, int]:
        """Return (file, offset, bytes) of external data, checked."""
        about = f"{self._path}: tensor {tensor.name!r}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        problem = path_problem(location)
        if problem:
            raise ModelFileError(
                f"{about} lies in the external data file {location!r}, which is refused: {problem}"
            )
        file = member(self._path.parent, location)
        if file is None:
            raise ModelFileError(
                f"{about} lies in the external data file {location!r}, which is missing; it "
                "belongs beside the model file"
            )
        nbytes = self._nbytes(tensor)
        numbers = {"offset": "0", "length": str(nbytes)} | entries
        for key in ("offset", "length"):
            if not re.fullmatch(r"[0-9]{1,18}", numbers[key]):
                raise ModelFileError(f"{about} has the external data {key} {numbers[key]!r}")
        offset, length = int(numbers["offset"]), int(numbers["length"])
        if length != nbytes:
            raise ModelFileError(
                f"{about} of shape {list(tensor.dims)} takes {nbytes} bytes, but its external "
                f"data has the length {length}"
            )
        size = file.stat().st_size
        if offset + nbytes > size:
            raise ModelFileError(
                f"{about} lies at bytes {offset} to {offset + nbytes} of {location!r}, which has "
                f"{size}; the file is truncated or belongs to another model"
            )
        self.files[file] = None
        return file, offset, nbytes
