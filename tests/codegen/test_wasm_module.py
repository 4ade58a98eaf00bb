"""Reading WebAssembly interfaces, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairy_compile.codegen.wasm.module import (
    ALLOWED_IMPORTS,
    REQUIRED_EXPORTS,
    check_module,
    read_interface,
)
from fairy_compile.errors import ModelFileError

HEADER = b"\0asm\x01\0\0\0"
NAMES = sorted(ALLOWED_IMPORTS)


def _name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def _section(kind: int, items: list[bytes]) -> bytes:
    body = bytes([len(items)]) + b"".join(items)
    size = len(body)
    return bytes([kind, size & 0x7F | 0x80, size >> 7]) + body  # LEB128 in two bytes


def make_module(imports: list[tuple[str, str]], exports: list[str]) -> bytes:
    """Return a module of imports and exports alone, all of them functions."""
    return (
        HEADER
        + _section(2, [_name(m) + _name(n) + b"\0\0" for m, n in imports])
        + _section(7, [_name(n) + b"\0\0" for n in exports])
    )


def test_imports_and_exports_are_read() -> None:
    # A custom section before, and one import of each kind: function, table, memory, global.
    kinds = [b"\0\x05", b"\x01\x70\x01\x02\x03", b"\x02\0\x11", b"\x03\x7f\0"]
    items = [_name("env") + _name(f"i{k}") + kind for k, kind in enumerate(kinds)]
    data = HEADER + b"\0\x03abc" + _section(2, items) + _section(7, [_name("memory") + b"\x02\0"])
    interface = read_interface(data)
    assert interface.imports == tuple(("env", f"i{k}") for k in range(4))
    assert interface.exports == ("memory",)


def test_a_module_with_everything_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "good.wasm"
    path.write_bytes(make_module(NAMES, list(REQUIRED_EXPORTS)))
    assert check_module(path) == []


@pytest.mark.parametrize("name", REQUIRED_EXPORTS)
def test_each_export_is_required(tmp_path: Path, name: str) -> None:
    path = tmp_path / "lacking.wasm"
    path.write_bytes(make_module(NAMES, [n for n in REQUIRED_EXPORTS if n != name]))
    assert check_module(path) == [f"it lacks {name}"]


def test_other_imports_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "greedy.wasm"
    imports = [*NAMES, ("wasi_snapshot_preview1", "path_open")]
    path.write_bytes(make_module(imports, list(REQUIRED_EXPORTS)))
    problem = "it imports wasi_snapshot_preview1.path_open, which is not offered"
    assert check_module(path) == [problem]


def test_every_cut_is_noticed_or_leaves_whole_sections() -> None:
    data = make_module(NAMES[:1], ["memory"])
    whole = {len(HEADER), len(data), len(make_module(NAMES[:1], [])) - 4}
    for length in range(len(data)):
        if length in whole:
            continue
        with pytest.raises(ModelFileError):
            read_interface(data[:length])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x7fELF", "not a WebAssembly module"),
        (HEADER + b"\x02" + b"\xff" * 11, "number that does not end"),
        (HEADER + b"\x02\x06\x01\x01\xff\x01a\0", "not text"),
        (HEADER + b"\x02\x06\x01\x01a\x01a\x09", "of kind 9"),
    ],
)
def test_malformed_modules_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ModelFileError, match=words):
        read_interface(data)
