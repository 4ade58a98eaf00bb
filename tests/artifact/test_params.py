from __future__ import annotations

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.artifact import ParamWriter, read_params
from fairy_compile.artifact.tensor_cache import ITEMSIZE, load_tensor_cache, numpy_dtype
from fairy_compile.errors import ModelFileError


def samples() -> dict[str, np.ndarray]:
    """One array of each dtype, at offsets that are not aligned."""
    rng = np.random.default_rng(0)
    arrays = {"odd": np.arange(3, dtype=np.uint8)}
    for i, dtype in enumerate(ITEMSIZE):
        values = rng.integers(0, 100, (2, 3 + i))
        arrays[f"p.{dtype}"] = values.astype(numpy_dtype(dtype))
    return arrays


def test_round_trip_of_every_dtype(tmp_path):
    arrays = samples()
    writer = ParamWriter(tmp_path)
    writer.add_all(arrays.items())
    written = writer.finish()
    assert written.bytes == sum(a.nbytes for a in arrays.values())
    found = dict(read_params(tmp_path))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_tvm_reads_the_same_bytes(tmp_path):
    tvm = pytest.importorskip("tvm")
    arrays = samples()
    writer = ParamWriter(tmp_path, shard_bytes=64)
    writer.add_all(arrays.items())
    writer.finish()
    tvm.get_global_func("vm.builtin.tensor_cache.load")(str(tmp_path), 1, 0)
    get = tvm.get_global_func("vm.builtin.tensor_cache.get")
    for name, array in arrays.items():
        tensor = get(name)
        assert str(tensor.dtype) == array.dtype.name
        raw = tensor.numpy()
        assert raw.shape == array.shape
        assert raw.tobytes() == array.tobytes()
    tvm.get_global_func("vm.builtin.tensor_cache.clear")()


def test_file_is_what_the_format_says(tmp_path):
    writer = ParamWriter(tmp_path)
    writer.add("a", np.array([[1, 2]], np.int32))
    writer.add("b", np.array(3, np.uint8))
    written = writer.finish({"BitsPerParam": 4.5})
    data = (tmp_path / "params_shard_0.bin").read_bytes()
    assert data == b"\1\0\0\0\2\0\0\0\3"
    assert written.files["params_shard_0.bin"].sha256 == hashlib.sha256(data).hexdigest()
    assert json.loads((tmp_path / "tensor-cache.json").read_text()) == {
        "metadata": {"ParamSize": 2, "ParamBytes": 9, "BitsPerParam": 4.5},
        "records": [
            {
                "dataPath": "params_shard_0.bin",
                "format": "raw-shard",
                "nbytes": 9,
                "md5sum": hashlib.md5(data).hexdigest(),
                "records": [
                    {
                        "name": "a",
                        "shape": [1, 2],
                        "dtype": "int32",
                        "format": "raw",
                        "nbytes": 8,
                        "byteOffset": 0,
                    },
                    {
                        "name": "b",
                        "shape": [],
                        "dtype": "uint8",
                        "format": "raw",
                        "nbytes": 1,
                        "byteOffset": 8,
                    },
                ],
            }
        ],
    }


def test_shards_split_as_the_tvm_dumper_splits(tmp_path):
    from tvm.contrib.tvmjs import dump_tensor_cache

    sizes = [300_000, 200_000, 600_000, 500_000, 100, 2_000_000, 548_576, 1]
    arrays = {f"p{i}": np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
    (tmp_path / "ours").mkdir()
    writer = ParamWriter(tmp_path / "ours", shard_bytes=1 << 20)
    writer.add_all(arrays.items())
    writer.finish()
    dump_tensor_cache(arrays, str(tmp_path / "tvm"), "raw", shard_cap_mb=1, show_progress=False)
    ours, theirs = (
        json.loads((tmp_path / who / "tensor-cache.json").read_text())["records"]
        for who in ("ours", "tvm")
    )
    assert ours == theirs
    assert len(ours) > 3


def test_big_endian_and_strided_arrays_are_normalised(tmp_path):
    writer = ParamWriter(tmp_path)
    writer.add("a", np.arange(6, dtype=">i4").reshape(2, 3).T)
    writer.finish()
    ((_, array),) = read_params(tmp_path)
    assert array.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_array_may_be_reused_after_add(tmp_path):
    writer = ParamWriter(tmp_path)
    array = np.ones(3, np.float32)
    writer.add("a", array)
    array[:] = 0
    writer.finish()
    assert next(read_params(tmp_path))[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "array",
    [np.zeros(2), np.zeros((0, 3), np.float32), np.zeros(2, complex), np.zeros(2, bool)],
)
def test_arrays_without_encoding(tmp_path, array):
    with pytest.raises(ValueError, match="no encoding"):
        ParamWriter(tmp_path).add("a", array)


def test_name_added_twice(tmp_path):
    writer = ParamWriter(tmp_path)
    writer.add("a", np.ones(1, np.int8))
    with pytest.raises(ValueError, match="twice"):
        writer.add("a", np.ones(1, np.int8))


def params(count: int = 10):
    for i in range(count):
        yield f"p{i}", np.full(10, i, np.float32)


def test_resumed_writer_gives_the_same_files(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    writer = ParamWriter(whole, shard_bytes=100)
    writer.add_all(params())
    expected = writer.finish()

    killed = ParamWriter.resume(parts, shard_bytes=100)
    for name, array in list(params())[:6]:
        killed.add(name, array)
    del killed  # as a kill would: an open shard, no tensor-cache.json
    (parts / "params_shard_7.bin").write_bytes(b"half written")

    resumed = ParamWriter.resume(parts, shard_bytes=100)
    assert [name for name, _ in params() if resumed.has(name)] == ["p0", "p1", "p2", "p3"]
    resumed.add_all(params())
    assert resumed.finish() == expected
    files = {p.name: p.read_bytes() for p in whole.iterdir()}
    assert files == {p.name: p.read_bytes() for p in parts.iterdir()}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "progress", "sizes"])
def test_resume_writes_damaged_shards_anew(tmp_path, damage):
    writer = ParamWriter(tmp_path, shard_bytes=100)
    writer.add_all(params(6))
    shard, progress = tmp_path / "params_shard_1.bin", tmp_path / "params-progress.json"
    if damage == "flip":
        shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    elif damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "progress":
        progress.write_text("[]")
    size = 120 if damage == "sizes" else 100
    resumed = ParamWriter.resume(tmp_path, shard_bytes=size)
    assert not resumed.has("p2")
    assert resumed.has("p0") == (damage not in ("progress", "sizes"))
    resumed.add_all(params(6))
    resumed.finish()
    assert [a[0] for _, a in read_params(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert not progress.exists()


def test_reading_some_names(tmp_path):
    writer = ParamWriter(tmp_path)
    writer.add_all(params(3))
    writer.finish()
    assert [name for name, _ in read_params(tmp_path, ["p2", "p0"])] == ["p2", "p0"]
    with pytest.raises(ModelFileError, match="'p9'"):
        list(read_params(tmp_path, ["p9"]))


def test_maps_are_read_only(tmp_path):
    writer = ParamWriter(tmp_path)
    writer.add("a", np.ones(2, ml_dtypes.bfloat16))
    writer.finish()
    array = load_tensor_cache(tmp_path).tensors["a"].map()
    assert array.dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
