"""GGUF headers: all types read, anything damaged refused before data are looked at."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError
from fairy_compile.frontends.gguf_file import GgufFile
from tests.tiny_gguf import F16, F32, write_gguf

DATA = np.arange(12, dtype=np.float32).reshape(3, 4)


def _file(path: Path, **changes) -> Path:
    metadata = {"a": "text", "b": 7, "c": True, "d": 2.5, "e": ["x", "ü"], "f": [1.5, 2.5]}
    tensors = {
        "t": (F32, DATA.shape, DATA.tobytes()),
        "u": (F16, (5,), np.arange(5, dtype=np.float16).tobytes()),
    }
    return write_gguf(path, metadata | changes, tensors)


@pytest.mark.parametrize("alignment", [32, 64])
def test_metadata_and_tensors_are_read(tmp_path: Path, alignment: int) -> None:
    file = GgufFile(_file(tmp_path / "x.gguf", **{"general.alignment": alignment}))
    plain = {key: value for key, value in file.metadata.items() if key not in "f"}
    assert plain == {
        "a": "text",
        "b": 7,
        "c": True,
        "d": 2.5,
        "e": ["x", "ü"],
        "general.alignment": alignment,
    }
    np.testing.assert_array_equal(file.metadata["f"], [1.5, 2.5])
    np.testing.assert_array_equal(file.read("t"), DATA)
    np.testing.assert_array_equal(file.read("u"), np.arange(5, dtype=np.float16))
    assert all(tensor.offset % alignment == 0 for tensor in file.tensors.values())


def test_number_types_keep_sign_and_width(tmp_path: Path) -> None:
    values = {0: ("B", 200), 1: ("b", -3), 2: ("H", 60000), 3: ("h", -300), 5: ("i", -7)}
    values |= {10: ("Q", 1 << 60), 11: ("q", -(1 << 60)), 12: ("d", 0.1)}
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    for kind, (code, value) in values.items():
        head += struct.pack("<Q", 1) + chr(97 + kind).encode()
        head += struct.pack(f"<I{code}", kind, value)
    (tmp_path / "x.gguf").write_bytes(head)
    found = GgufFile(tmp_path / "x.gguf").metadata
    assert found == {chr(97 + kind): value for kind, (_, value) in values.items()}


@pytest.mark.parametrize("end", [0, 3, 4, 12, 23, 30, 60, 100, 200, 260, -5])
def test_truncated_files_are_refused(tmp_path: Path, end: int) -> None:
    raw = _file(tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(raw[:end])
    with pytest.raises(ModelFileError, match=r"x\.gguf"):
        GgufFile(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("at", "new", "words"),
    [
        (0, b"GGML", "is no GGUF file"),
        (4, struct.pack("<I", 1), "of version 1; versions read here: 2, 3"),
        (4, struct.pack(">I", 3), "gguf-convert-endian"),
        (8, struct.pack("<Q", 1 << 40), "announces 1099511627776 tensors"),
        (24, struct.pack("<Q", 1 << 62), "name of a metadata entry of 4611686018427387904 bytes"),
        (33, struct.pack("<I", 77), "value of the unknown type 77"),
        (37, struct.pack("<Q", 1 << 50), "header that goes on for"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, at: int, new: bytes, words: str) -> None:
    path = _file(tmp_path / "x.gguf")
    raw = bytearray(path.read_bytes())
    raw[at : at + len(new)] = new
    path.write_bytes(raw)
    with pytest.raises((ModelFileError, UnsupportedError), match=words):
        GgufFile(path)


@pytest.mark.parametrize("alignment", [0, 3, "32"])
def test_alignments_are_powers_of_two(tmp_path: Path, alignment) -> None:
    path = write_gguf(tmp_path / "x.gguf", {}, {})
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = b"general.alignment"
    value = struct.pack("<II", 4, alignment) if alignment != "32" else struct.pack("<IQ", 8, 2)
    value += b"32" if alignment == "32" else b""
    path.write_bytes(head + struct.pack("<Q", len(key)) + key + value)
    with pytest.raises(ModelFileError, match=r"general\.alignment = .*allowed: powers of two"):
        GgufFile(path)


def test_names_appear_once(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.gguf", t=1)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(struct.pack("<Q", 1) + b"u", struct.pack("<Q", 1) + b"t"))
    with pytest.raises(ModelFileError, match="has the tensor 't' twice"):
        GgufFile(path)


def test_tensors_do_not_reach_into_others(tmp_path: Path) -> None:
    tensors = {"t": (F32, (9,), DATA.tobytes()[:32]), "u": (F32, (1,), b"\0" * 4)}
    path = write_gguf(tmp_path / "x.gguf", {}, tensors)
    with pytest.raises(ModelFileError, match="has 32 bytes for 't', which needs 36"):
        GgufFile(path)
    file = GgufFile(_file(tmp_path / "y.gguf"))
    with pytest.raises(ModelFileError, match="for 't', which needs 100"):
        file.read_bytes("t", (100,))


def test_arrays_of_countless_texts_are_refused_at_once(tmp_path: Path) -> None:
    """Empty texts take 8 bytes each, and some 30 million of them minutes to read."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    head += struct.pack("<IIQ", 9, 8, (1 << 22) + 1)
    path = tmp_path / "x.gguf"
    path.write_bytes(head + b"\0" * (8 * ((1 << 22) + 2)))
    with pytest.raises(ModelFileError, match="array of 4194305 texts, more than a header holds"):
        GgufFile(path)


def test_files_that_shrink_are_refused(tmp_path: Path) -> None:
    file = GgufFile(_file(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="ended while 't' was read"):
        file.read("t")


def test_other_types_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {}, {"q": (8, (32,), b"\0" * 34)})
    with pytest.raises(UnsupportedError, match=r"of ggml's type 8; allowed: 0 \(float32\)"):
        GgufFile(path).read("q")


def test_any_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    raw = _file(tmp_path / "x.gguf").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        changed = bytearray(raw)
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            changed[at] = rng.choice([0, 1, 8, 9, 127, 128, 255, int(rng.integers(256))])
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            file = GgufFile(tmp_path / "x.gguf")
            for name, info in file.tensors.items():
                if info.type in (0, 1, 30):
                    file.read(name)
        except FairyError:
            refused += 1
    assert refused > 1000
