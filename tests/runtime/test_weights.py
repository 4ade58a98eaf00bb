"""Loading weights into host memory."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.artifact import ParamWriter
from fairy_compile.errors import ModelFileError
from fairy_compile.runtime import host_memory, weights

ARRAYS = {
    "codes": np.arange(77, dtype=np.uint8).reshape(7, 11),
    "scales": np.linspace(0.1, 1, 5, dtype=np.float32),
    "half": np.linspace(-1, 1, 33).astype(np.float16),
    "brain": np.linspace(-1, 1, 9).astype(ml_dtypes.bfloat16).reshape(3, 3),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    writer = ParamWriter(tmp_path, shard_bytes=64)
    writer.add_all(ARRAYS.items())
    writer.finish()
    return tmp_path


def test_every_dtype_arrives_unchanged_in_the_order_asked_for(directory: Path) -> None:
    names = list(reversed(ARRAYS))
    for name, tensor in zip(names, weights.load_host_weights(directory, names), strict=True):
        array = ARRAYS[name]
        assert (tuple(tensor.shape), str(tensor.dtype)) == (array.shape, array.dtype.name)
        flat = tensor._create_view((array.nbytes,), "uint8").numpy()
        assert flat.tobytes() == array.tobytes()


def test_tensors_are_aligned(directory: Path) -> None:
    for tensor in weights.load_host_weights(directory, list(ARRAYS)):
        flat = np.from_dlpack(tensor._create_view((1,), "uint8"))
        assert flat.ctypes.data % host_memory.ALIGNMENT == 0


def test_tensors_outlive_each_other(directory: Path) -> None:
    """The block lives as long as any tensor of it."""
    last = weights.load_host_weights(directory, list(ARRAYS))[1]
    np.testing.assert_array_equal(last.numpy(), ARRAYS["scales"])


def test_missing_tensor_is_named(directory: Path) -> None:
    with pytest.raises(ModelFileError, match="'bias'"):
        weights.load_host_weights(directory, ["codes", "bias"])
