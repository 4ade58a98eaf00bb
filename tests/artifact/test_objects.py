"""Object files are read as compilers write them, and refused when they are damaged."""

from __future__ import annotations

import random
import struct

import pytest
import tvm
from tvm.script import tirx as T

from fairy_compile.artifact.objects import read_object
from fairy_compile.errors import ModelFileError


@T.prim_func(s_tir=True)
def doubled(x_: T.handle, y_: T.handle):
    T.func_attr({"global_symbol": "doubled"})
    x, y = T.match_buffer(x_, (4,), "float32"), T.match_buffer(y_, (4,), "float32")
    for i in range(4):
        with T.sblock("double"):
            v = T.axis.spatial(4, i)
            y[v] = x[v] * T.float32(2) + T.exp(x[v])


@pytest.fixture(scope="module", params=["x86_64-linux-gnu", "arm64-apple-ios15.0"])
def data(request, tmp_path_factory) -> bytes:
    target = tvm.target.Target({"kind": "llvm", "mtriple": request.param})
    path = tmp_path_factory.mktemp("object") / "lib0.o"
    tvm.tirx.build(tvm.IRModule({"doubled": doubled}), target=target).write_to_file(str(path))
    return path.read_bytes()


def test_symbols_are_those_of_the_compiler(data: bytes) -> None:
    found = read_object("lib0.o", data)
    function = found.symbols["__tvm_ffi_doubled"]
    assert function.defined
    assert not function.weak
    assert found.contents(function)
    assert not found.symbols["expf"].defined
    assert "TVMFFIErrorSetRaisedFromCStrParts" in found.symbols


@pytest.mark.parametrize("data_", [b"", b"\x7fELF", b"!<arch>\n" + bytes(64), bytes(200)])
def test_other_files_are_refused(data_: bytes) -> None:
    with pytest.raises(ModelFileError, match="expected an ELF or Mach-O object"):
        read_object("x.o", data_)


def test_shared_libraries_are_refused() -> None:
    header = b"\x7fELF\x02\x01" + bytes(10) + struct.pack("<HH", 3, 62) + bytes(80)
    with pytest.raises(ModelFileError, match="malformed: ELF type 3"):
        read_object("x.so", header)


def test_damage_is_an_error_or_harmless(data: bytes) -> None:
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.randrange(1, 8)):
            if damaged:
                headers = rng.random() < 0.5
                at = rng.randrange(min(400, len(damaged)) if headers else len(damaged))
                damaged[at] = rng.randrange(256)
        try:
            found = read_object("lib0.o", bytes(damaged))
        except ModelFileError:
            continue
        for symbol in found.symbols.values():
            assert len(found.contents(symbol)) <= len(damaged)
