"""Target files and how they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairy_compile import FairyError, targets
from fairy_compile.kernels import FAMILIES

CPU_TARGETS = {
    "android-cpu", "arm64-i8mm", "arm64-linux", "cpu", "macos-cpu", "rpi5", "windows-x86-64-v3",
    "windows-x86-64-v4", "x86-64-v3", "x86-64-v4", "x86-amx",
}  # fmt: skip


def test_all_cpu_targets_load() -> None:
    assert set(targets.target_names()) >= CPU_TARGETS
    for name in targets.target_names():
        target = targets.load_target(name)
        assert target.description
        assert set(target.kernels) <= set(FAMILIES)
        assert target.to_tvm().kind.name == target.tvm["kind"]


def test_features_named_by_files_are_known_to_llvm() -> None:
    """A misspelt feature would silently never match."""
    import tvm

    known = tvm.get_global_func("target.llvm_get_cpu_features")
    for name in CPU_TARGETS - {"cpu"}:
        target = targets.load_target(name)
        description = {k: v for k, v in target.tvm.items() if k in ("kind", "mtriple", "mcpu")}
        spelled = {f"+{feature}" for feature in target.features}
        on = {f"+{f}" for f in known(tvm.target.Target(description | {"mattr": sorted(spelled)}))}
        assert spelled <= on, name


def test_cpu_is_this_machine() -> None:
    cpu = targets.load_target("cpu")
    assert cpu.detected
    assert cpu.runs_here()
    assert cpu.features == targets.host_features()


def test_the_cpu_of_a_windows_machine_is_linked_as_windows_targets_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets.platform, "system", lambda: "Windows")
    cpu, windows = targets.load_target("cpu"), targets.load_target("windows-x86-64-v3")
    assert cpu.detected
    assert cpu.runs_here()
    assert (cpu.library, cpu.linkers) == ("dll", windows.linkers)
    assert cpu.tvm["mtriple"] == windows.tvm["mtriple"]
    assert windows.runs_here() == (windows.features <= targets.host_features())


def test_foreign_machines_do_not_run_here() -> None:
    assert not targets.load_target("macos-cpu").runs_here()
    assert not targets.load_target("android-cpu").runs_here()


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(FairyError, match=r"unknown target 'rpi'.*Did you mean rpi5"):
        targets.load_target("rpi")


def test_malformed_target_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('description = "no kernels"\n')
    monkeypatch.setattr(targets, "targets_directory", lambda: tmp_path)
    with pytest.raises(FairyError, match=r"mine\.toml is malformed"):
        targets.load_target("mine")


def test_arm_features_are_read_from_the_system(tmp_path: Path) -> None:
    """LLVM's own detection does not know dot product on Linux."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nFeatures\t: fp asimd aes asimdhp asimddp\nCPU part : 0xd0b\n"
    )
    assert targets._arm_features(cpuinfo) == {"neon", "dotprod", "fullfp16"}
