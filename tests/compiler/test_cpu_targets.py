"""Every CPU target builds; those this machine can execute compute the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from fairy_compile.compiler.export import find_linker
from fairy_compile.errors import FairyError
from fairy_compile.targets import load_target
from tests.tiny_models import relative_error

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
# First bytes of a library for each machine: ELF machine 0xB7 and Mach-O CPU type 0x0100000C are
# 64-bit ARM; a tar is gzip-compressed; libraries for Windows are what its programs are.
ELF_ARM64 = (18, b"\xb7\x00")
MACHO_ARM64 = (0, b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01")
GZIP = (0, b"\x1f\x8b")
WINDOWS = (0, b"MZ")
FOREIGN = {
    "arm64-linux": ELF_ARM64,
    "arm64-i8mm": ELF_ARM64,
    "rpi5": ELF_ARM64,
    "macos-cpu": MACHO_ARM64,
    "android-cpu": GZIP,
    "windows-x86-64-v3": WINDOWS,
    "windows-x86-64-v4": WINDOWS,
}


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4", "x86-amx"])
def test_x86_targets_agree_with_float_within_the_int8_contract(
    model: Path, tmp_path: Path, name: str
) -> None:
    if not load_target(name).runs_here():
        pytest.skip(f"this machine cannot execute {name}")
    report = fc.build(model, target=name, act="int8", output=tmp_path / "int8", context=64)
    assert set(report.kernels()) != {"generic"}
    fc.build(model, target="cpu", act="float", output=tmp_path / "float", context=64)
    with fc.load(tmp_path / "int8") as int8, fc.load(tmp_path / "float") as exact:
        # One layer: see tests/models/test_parity.py for the bound.
        bound = np.sqrt(5) * np.sqrt(128) / (127 * np.sqrt(12))
        assert relative_error(int8.logits(TOKENS), exact.logits(TOKENS)) <= bound


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_foreign_targets_give_a_library_for_their_machine(
    model: Path, tmp_path: Path, name: str
) -> None:
    target = load_target(name)
    if target.library != "tar":
        try:
            find_linker(target)
        except FairyError as error:
            pytest.skip(str(error))
    fc.build(model, target=name, output=tmp_path / "out", context=64)
    offset, want = FOREIGN[name]
    data = (tmp_path / "out" / f"model.{target.library}").read_bytes()
    assert data[offset : offset + len(want)] == want
    elsewhere = {
        "so": "cannot load|lacks",
        "dylib": "macOS",
        "dll": "Windows",
        "tar": "app's linker",
    }
    with pytest.raises(fc.FairyError, match=elsewhere[target.library]):
        fc.load(tmp_path / "out")


def test_missing_linker_is_named_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FairyError, match=r"aarch64-linux-gnu-gcc, zig.*pip install"):
        fc.build(model, target="arm64-linux", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
