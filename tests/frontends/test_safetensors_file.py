"""The safetensors reader; bad-file tests are named after the attack they stop."""

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.safetensors_file import HEADER_LIMIT, SafetensorsFile

from .conftest import DTYPES, safetensors_bytes, tiny_tensors

A = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def open_bytes(path, data: bytes) -> SafetensorsFile:
    path.write_bytes(data)
    return SafetensorsFile(path)


def open_header(path, header: object, data: bytes = b"\0" * 32) -> SafetensorsFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return open_bytes(path, struct.pack("<Q", len(text)) + text + data)


def entry(begin=0, end=24, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_was_written(path, dtype):
    tensors = tiny_tensors(dtype)
    file = open_bytes(path, safetensors_bytes(tensors))
    assert list(file.tensors) == list(tensors)
    for name, want in tensors.items():
        got = file.read(name)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_agrees_with_the_safetensors_library(path):
    from safetensors.numpy import save_file

    save_file(A, path, metadata={"format": "np"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "np"}
    for name, want in A.items():
        np.testing.assert_array_equal(file.read(name), want)


def test_scalars_and_empty_tensors(path):
    tensors = {"empty": np.zeros((0, 4), np.float32), "scalar": np.float32(3).reshape(())}
    file = open_bytes(path, safetensors_bytes(tensors))
    assert file.read("empty").shape == (0, 4)
    assert file.read("scalar") == 3


def test_empty_file(path):
    with pytest.raises(ModelFileError, match="0 bytes long"):
        open_bytes(path, b"")


def test_header_longer_than_the_file(path):
    with pytest.raises(ModelFileError, match="announces a header of 100 bytes but only 5 follow"):
        open_bytes(path, struct.pack("<Q", 100) + b"{}   ")


def test_header_length_of_all_ones(path):
    with pytest.raises(ModelFileError, match="announces a header"):
        open_bytes(path, b"\xff" * 8 + b"{}")


def test_header_over_the_limit(path):
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_LIMIT + 1))
        file.truncate(8 + HEADER_LIMIT + 1)
    with pytest.raises(ModelFileError, match=f"allowed: {HEADER_LIMIT}"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "text",
    [b"{", b"\xff\xfe", b"not json", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000],
    ids=["cut", "not utf-8", "words", "huge number", "deep nesting"],
)
def test_header_that_is_not_json(path, text):
    with pytest.raises(ModelFileError, match="not valid JSON"):
        open_header(path, text)


def test_header_that_is_a_list(path):
    with pytest.raises(ModelFileError, match="expected an object"):
        open_header(path, [])


def test_duplicate_names(path):
    one = json.dumps(entry()).encode()
    with pytest.raises(ModelFileError, match="'a' appears twice"):
        open_header(path, b'{"a": ' + one + b', "a": ' + one + b"}", bytes(24))


def test_truncated_file(path):
    with pytest.raises(ModelFileError, match="truncated: its tensors need"):
        open_bytes(path, safetensors_bytes(A)[:-1])


def test_trailing_bytes(path):
    with pytest.raises(ModelFileError, match="3 bytes that belong to no tensor"):
        open_bytes(path, safetensors_bytes(A) + b"xyz")


def test_offsets_past_the_end(path):
    with pytest.raises(ModelFileError, match="truncated"):
        open_header(path, {"a": entry(0, 2**40, (2**38,))})


def test_overlapping_offsets(path):
    with pytest.raises(ModelFileError, match="overlaps"):
        open_header(path, {"a": entry(0, 24), "b": entry(8, 32)})


def test_two_tensors_over_the_same_bytes(path):
    with pytest.raises(ModelFileError, match="overlaps"):
        open_header(path, {"a": entry(0, 24), "b": entry(0, 24)}, bytes(24))


def test_gap_between_tensors(path):
    with pytest.raises(ModelFileError, match="gap"):
        open_header(path, {"a": entry(0, 24), "b": entry(28, 32, (1,))})


def test_offsets_the_wrong_way_round(path):
    with pytest.raises(ModelFileError, match="data_offsets"):
        open_header(path, {"a": entry(24, 0)})


@pytest.mark.parametrize("offsets", [[0], [0, 24, 48], [-8, 16], [0.0, 24.0], [False, 24], None])
def test_offsets_that_are_not_two_positions(path, offsets):
    with pytest.raises(ModelFileError, match="data_offsets"):
        open_header(path, {"a": entry() | {"data_offsets": offsets}})


def test_wrong_number_of_bytes(path):
    with pytest.raises(ModelFileError, match=r"stores 20 bytes for 'a', but F32 \(2, 3\) needs 24"):
        open_header(path, {"a": entry(0, 20)})


def test_product_of_dimensions_beyond_64_bits(path):
    # 2**62 * 4 * 4 bytes wraps to 0 in 64-bit arithmetic.
    with pytest.raises(ModelFileError, match="needs 73786976294838206464"):
        open_header(path, {"a": entry(0, 0, (2**62, 4))})


@pytest.mark.parametrize("shape", [[-1], [1.5], [True], ["2"], "23", [1] * 9, [2**63]])
def test_shape_that_is_not_dimensions(path, shape):
    with pytest.raises(ModelFileError, match="shape"):
        open_header(path, {"a": entry() | {"shape": shape}})


@pytest.mark.parametrize("dtype", ["F4", "f32", 3, None])
def test_unknown_dtype(path, dtype):
    with pytest.raises(UnsupportedError, match="'a' has dtype"):
        open_header(path, {"a": entry(dtype=dtype)})


@pytest.mark.parametrize("bad", [{"dtype": "F32"}, entry() | {"extra": 1}, [], None])
def test_entry_with_other_keys(path, bad):
    with pytest.raises(ModelFileError, match="'a' without exactly"):
        open_header(path, {"a": bad})


@pytest.mark.parametrize("metadata", [{"a": 1}, [], "text"])
def test_metadata_that_is_not_text(path, metadata):
    with pytest.raises(ModelFileError, match="__metadata__"):
        open_header(path, {"__metadata__": metadata}, b"")


def test_file_that_shrinks_after_opening(path):
    file = open_bytes(path, safetensors_bytes(A))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="ended while 'b' was read"):
        file.read("b")


def test_a_file_that_this_user_may_not_read(path, monkeypatch):
    """Tests may run as one who reads all."""

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ModelFileError, match=f"cannot read {path}: Permission denied; give files"):
        SafetensorsFile(path)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_bytes_are_read_or_refused(data):
    # Whatever a few flipped or lost bytes do, reading ends in data or in a ModelFileError.
    original = safetensors_bytes(A)
    damaged = bytearray(original[: data.draw(st.integers(0, len(original)))])
    for _ in range(data.draw(st.integers(0, 4)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        try:
            file = open_bytes(Path(directory) / "x", bytes(damaged))
        except (ModelFileError, UnsupportedError):
            return
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape
