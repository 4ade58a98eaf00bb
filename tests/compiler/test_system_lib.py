"""System libraries: objects of several models in one program, told apart by their symbols."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, te

import fairy_compile as fc
from fairy_compile.artifact.objects import ObjectFile, Symbol
from fairy_compile.artifact.signature import signatures_of
from fairy_compile.artifact.system_lib import (
    check_system_lib,
    read_system_lib,
    system_lib_prefix,
)
from fairy_compile.compiler.export import export_library
from fairy_compile.compiler.gate import check_executable, check_objects
from fairy_compile.compiler.pipeline import compile_module
from fairy_compile.errors import FairyError
from fairy_compile.targets import Target, load_target

needs_linker = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("gcc"), reason="needs gcc on Linux"
)


def app_target() -> Target:
    """Return the target of an app for this machine."""
    return replace(load_target("cpu"), library="tar", linkers=())


def link_app(tars: Sequence[Path], directory: Path) -> ctypes.CDLL:
    """Link the objects of model libraries as an app does, and load the result."""
    objects = []
    for i, path in enumerate(tars):
        with tarfile.open(path) as tar:
            tar.extractall(directory / str(i), filter="data")
        objects += sorted(map(str, (directory / str(i)).iterdir()))
    library = directory / "app.so"
    # Relocations in read-only sections would be refused by Android's loader.
    subprocess.run(["gcc", "-shared", "-Wl,-z,text", "-o", library, *objects], check=True)
    return ctypes.CDLL(str(library))


def module_adding(amount: float) -> tvm.IRModule:
    """Return a module with ``main``: x float32 (n,) -> x + amount."""
    bb = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([n], "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            y = bb.emit_te(
                lambda a: te.compute(a.shape, lambda i: a[i] + tvm.tirx.const(amount, "float32")),
                x,
                primfunc_name_hint="add_amount",
            )
            result = bb.emit_output(y)
        bb.emit_func_output(result)
    return bb.finalize()


@needs_linker
def test_models_of_one_app_keep_apart(tmp_path: Path) -> None:
    """The kernels of both have the same name, and the linker would take the first for both."""
    target, tars = app_target(), []
    amounts = {"model-of-one": 1.0, "model-of-two": 2.0}
    for name, amount in amounts.items():
        prefix = system_lib_prefix(name)
        executable = compile_module(module_adding(amount), target, ["main"], symbol_prefix=prefix)
        (tmp_path / name).mkdir()
        tars.append(export_library(executable, target, tmp_path / name))
    app = link_app(tars, tmp_path)
    assert app.__tvm_ffi_model_of_one_add_amount
    for name, amount in amounts.items():
        library = tvm.runtime.system_lib(system_lib_prefix(name))
        machine = relax.VirtualMachine(library, tvm.cpu())
        found = machine["main"](tvm.runtime.tensor(np.arange(5, dtype="float32"))).numpy()
        np.testing.assert_array_equal(found, np.arange(5) + amount)


def test_export_is_reproducible(tmp_path: Path) -> None:
    target = app_target()
    executable = compile_module(
        module_adding(1.0), target, ["main"], symbol_prefix="model_repeated_"
    )
    bytes_of = []
    for name in "ab":
        (tmp_path / name).mkdir()
        bytes_of.append(export_library(executable, target, tmp_path / name).read_bytes())
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize(
    ("triple", "form", "platform"),
    [
        ("aarch64-linux-android", "elf", ""),
        ("arm64-apple-ios15.0", "macho", "ios"),
        ("arm64-apple-macos13.0", "macho", "macos"),
    ],
)
def test_objects_are_read_and_checked(
    monkeypatch, tmp_path: Path, triple: str, form: str, platform: str
) -> None:
    cpu = {"kind": "llvm", "mtriple": triple}
    target = replace(load_target("android-cpu"), tvm=cpu, features=frozenset())
    module = module_adding(1.0)
    executable = compile_module(module, target, ["main"], symbol_prefix="model_read_")
    objects = read_system_lib(export_library(executable, target, tmp_path))
    assert {(o.format, o.machine, o.platform) for o in objects} == {(form, "aarch64", platform)}
    required = {"main": "(n) float32 -> (n) float32"}
    monkeypatch.setitem(check_system_lib.__globals__["REQUIRED_FUNCTIONS"], "cpu", required)

    def problems(name: str = "model-read", triple: str = triple, functions=required) -> list[str]:
        return check_system_lib(objects, name, device="cpu", triple=triple, functions=functions)

    assert not problems()
    assert "no object defines the symbol model_other___tvm_ffi__library_bin" in problems(
        "model-other"
    )
    assert any("links" in p for p in problems(triple="x86_64-linux-gnu"))
    assert any("lacks the prefix model_other_" in p for p in problems("model-other"))
    monkeypatch.setitem(required, "decode", "-> object")
    assert problems() == ["the bytecode has no function decode"]
    monkeypatch.setitem(required, "decode", "(b) float32 -> none")
    assert problems() == ["no object defines the function decode"]


def test_only_linux_has_its_system_calls() -> None:
    """Which kernels with AMX ask for; the object is no more than that symbol."""
    asks = {"syscall": Symbol("syscall", defined=False, weak=False)}
    found = {}
    for form, machine, triple in (
        ("elf", "x86_64", "x86_64-unknown-linux-gnu"),
        ("macho", "aarch64", "arm64-apple-ios15.0"),
    ):
        obj = ObjectFile("kernels.o", form, machine, "", asks, b"")
        problems = check_system_lib([obj], "m", device="cpu", triple=triple, functions={})
        found[form] = any("syscall" in problem for problem in problems)
    assert found == {"elf": False, "macho": True}


def test_the_gate_refuses_what_passes_lost() -> None:
    module = module_adding(1.0)
    executable = compile_module(module, app_target(), ["main"], symbol_prefix="model_gate_")
    signatures = signatures_of(module)
    check_executable(executable, signatures)
    with pytest.raises(RuntimeError, match="has no function 'other'"):
        check_executable(executable, {"other": signatures["main"]})
    longer = replace(signatures["main"], args=signatures["main"].args * 2)
    with pytest.raises(RuntimeError, match="takes 1 arguments, not 2"):
        check_executable(executable, {"main": longer})


def test_the_gate_refuses_objects_without_prefix(tmp_path: Path) -> None:
    target = app_target()
    executable = compile_module(module_adding(1.0), target, ["main"], symbol_prefix="model_gate_")
    path = export_library(executable, target, tmp_path)
    with pytest.raises(RuntimeError, match=r"no app can link .* symbol other_name___tvm_ffi__lib"):
        check_objects(path, "other_name", target, {})


def test_names_are_for_phones(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FairyError, match="--model-lib abc: a library for cpu is loaded"):
        fc.build(model, target="cpu", model_lib="abc", output=tmp_path / "x")
    with pytest.raises(FairyError, match="--model-lib is 'short'; allowed: 7 to 64 letters"):
        fc.build(model, target="android-cpu", model_lib="short", output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@needs_linker
@pytest.mark.slow
def test_a_linked_model_computes_what_its_shared_library_does(
    monkeypatch, model: Path, tmp_path: Path
) -> None:
    """What MLC's apps do with ``system://tiny-model-lib``: link, find by prefix, run."""
    tokens = [3, 14, 15, 92, 65, 35]
    fc.build(model, output=tmp_path / "shared", context=64)
    with fc.load(tmp_path / "shared") as shared:
        metadata, expected = shared.engine.metadata, shared.logits(tokens)
    monkeypatch.setattr(sys.modules[fc.build.__module__], "load_target", lambda _: app_target())
    fc.build(model, output=tmp_path / "linked", context=64, model_lib="tiny-model-lib")
    link_app([tmp_path / "linked" / "model.tar"], tmp_path)
    library = tvm.runtime.system_lib("tiny_model_lib_")
    monkeypatch.setattr(tvm.runtime, "load_module", lambda _: library)
    with fc.load(tmp_path / "linked") as linked:
        assert linked.engine.metadata == metadata
        np.testing.assert_array_equal(linked.logits(tokens), expected)
