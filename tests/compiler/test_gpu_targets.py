"""GPU targets build on this machine, say what they compute with, and refuse in words."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile.artifact import verify
from fairy_compile.artifact.contract import DRAFT_DEVICES, REQUIRED_FUNCTIONS
from fairy_compile.compiler.plan import pick_kernel
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import Limits, load_target
from tests.tiny_models import save_model

GPU_TARGETS = {
    "android": "opencl",
    "android-adreno": "opencl",
    "android-mali": "opencl",
    "iphone": "metal",
    "metal": "metal",
    "opencl": "opencl",
    "vulkan": "vulkan",
    "vulkan-adreno": "vulkan",
    "vulkan-amd": "vulkan",
    "vulkan-intel": "vulkan",
    "vulkan-mali": "vulkan",
    "vulkan-nvidia": "vulkan",
    "webgpu": "webgpu",
    "windows-vulkan": "vulkan",
}
OTHERS = sorted(set(GPU_TARGETS) - {"metal"})
# First bytes of a library: ELF, 64-bit ARM Mach-O, Windows, gzip of a tar, WebAssembly.
MAGIC = {
    "so": b"\x7fELF",
    "dylib": b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01",
    "dll": b"MZ",
    "tar": b"\x1f\x8b",
    "wasm": b"\0asm",
}


@pytest.mark.parametrize("name", sorted(GPU_TARGETS))
def test_targets_say_what_groups_may_use(name: str) -> None:
    target = load_target(name)
    assert target.device == GPU_TARGETS[name]
    assert target.limits is not None
    assert target.to_tvm().attrs["max_shared_memory_per_block"] == target.limits.shared_bytes


@pytest.mark.parametrize(
    "name", ["metal", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_targets_plan_their_own_kernel(model: Path, name: str) -> None:
    device = GPU_TARGETS[name]
    report = fc.build(model, target=name, dry_run=True)
    assert report.kernels() == {f"{device}.words": len(report.layers)}
    assert {row.act for row in report.layers} == {"float16"}
    assert report.sizes["act_dtype"] == report.sizes["kv_dtype"] == "float16"
    exact = fc.build(model, target=name, act="float", dry_run=True)
    assert {row.act for row in exact.layers} == {"float"}
    assert exact.sizes["act_dtype"] == exact.sizes["kv_dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GPU_TARGETS))
def test_targets_give_a_whole_model_directory(model: Path, tmp_path: Path, name: str) -> None:
    target = load_target(name)
    if target.linkers or target.library == "wasm":
        pytest.importorskip("ziglang", reason='needs: pip install "fairy-compile[cross,web]"')
    fc.build(model, target=name, output=tmp_path / "out", context=64)
    manifest = verify(tmp_path / "out").manifest
    magic = MAGIC[target.library]
    assert (tmp_path / "out" / manifest.library).read_bytes()[: len(magic)] == magic
    assert REQUIRED_FUNCTIONS[target.device].keys() <= set(manifest.functions)
    drafts = {"batch_verify", "gather_probs", "sampler_verify_draft_tokens", "scatter_probs"}
    assert drafts & set(manifest.functions) == (drafts if target.device in DRAFT_DEVICES else set())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixture") / "model", "mixtral")


@pytest.mark.parametrize("name", ["cuda", "cuda-hopper"])
@pytest.mark.parametrize("act", ["int16", "int8"])
def test_experts_on_cuda_compute_in_floating_point(mixture: Path, name: str, act: str) -> None:
    """The other kernels multiply by one matrix; nothing falls back without saying so."""
    rows = fc.build(mixture, target=name, act=act, dry_run=True).layers
    experts = [row for row in rows if ".experts." in row.name]
    assert len(experts) == 4
    own = ", ".join(load_target(name).kernels[:-1])
    for row in experts:
        assert (row.kernel, row.act) == ("cuda.words", "float16")
        reason = f"not {own}: it multiplies by one matrix, not by those of several experts"
        assert reason in row.reason
        assert f"floating point; this call asks for {act}" in row.reason
        assert "5 experts" in row.reason
    assert {row.kernel for row in rows if ".self_attn." in row.name} == {own.split(",")[0]}
    exact = fc.build(mixture, target=name, act="float", dry_run=True).layers
    assert {row.act for row in exact} == {"float"}


def test_a_target_without_kernels_for_experts_refuses_them(monkeypatch, mixture: Path) -> None:
    bare = replace(load_target("cuda"), name="bare", kernels=("cuda.planes",))
    monkeypatch.setattr(sys.modules[fc.build.__module__], "load_target", lambda _: bare)
    words = r"is a mixture of 5 experts; target bare has no kernels.*--target cpu"
    with pytest.raises(UnsupportedError, match=words):
        fc.build(mixture, target="bare", act="int16", dry_run=True)


def test_more_codes_than_offsets_reach_are_refused() -> None:
    spec = PhaseSpec((14336,), 8192, 2, ("U", "W"), "tensor", "float", "float16", "float16")
    words = r"codes of 128 experts take 3758096384 words; its offsets reach 2147483647"
    with pytest.raises(UnsupportedError, match=words):
        pick_kernel(spec, load_target("metal"), experts=128)
    assert pick_kernel(spec, load_target("metal"), experts=8)[0].name == "metal.words"


def test_contexts_of_gpus_go_beyond_the_sliding_window(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "gemma3", sliding_window=32)
    report = fc.build(model, target="opencl", dry_run=True)
    assert report.sizes["context"] == fc.build(model, dry_run=True).sizes["context"] == 256
    assert any("float16" in note and "--act float" in note for note in report.notes)
    exact = fc.build(model, target="opencl", act="float", dry_run=True)
    assert not any("float16" in note for note in exact.notes)


def test_browsers_without_float16_get_float32(model: Path) -> None:
    report = fc.build(model, target="webgpu-f32", dry_run=True)
    assert report.kernels() == {"webgpu.words": len(report.layers)}
    assert report.sizes["act_dtype"] == report.sizes["kv_dtype"] == "float32"


def test_arrays_that_no_buffer_holds_are_refused(monkeypatch, model: Path) -> None:
    plain = load_target("webgpu")
    tiny = replace(plain, name="tiny", limits=replace(plain.limits, buffer_bytes=1024))
    monkeypatch.setattr(sys.modules[fc.build.__module__], "load_target", lambda _: tiny)
    words = r"parameter \S+ takes \d+ bytes; an array on target tiny has at most 1024"
    with pytest.raises(UnsupportedError, match=words):
        fc.build(model, dry_run=True)


def test_without_zig_nothing_is_begun(monkeypatch, model: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("fairy_compile.codegen.wasm.runtime.zig_command", lambda: None)
    with pytest.raises(FairyError, match=r"needs zig.*pip install \"fairy-compile\[web\]\""):
        fc.build(model, target="webgpu", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_without_float16_computes_in_float32(monkeypatch, model: Path) -> None:
    plain = replace(load_target("opencl"), name="plain", features=frozenset())
    monkeypatch.setattr(sys.modules[fc.build.__module__], "load_target", lambda _: plain)
    report = fc.build(model, dry_run=True)
    assert report.sizes["act_dtype"] == report.sizes["kv_dtype"] == "float32"
    with pytest.raises(UnsupportedError, match="plain has no 16-bit floats; allowed: float32"):
        fc.build(model, kv_dtype="float16", dry_run=True)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(256, 4096), "needs 8192 bytes of shared memory; target tiny has 4096"),
        (Limits(64, 32768), "needs 256 threads a group; target tiny has 64"),
    ],
)
def test_too_small_devices_are_refused(monkeypatch, model: Path, limits, words: str) -> None:
    tiny = replace(load_target("opencl"), name="tiny", limits=limits)
    monkeypatch.setattr(sys.modules[fc.build.__module__], "load_target", lambda _: tiny)
    with pytest.raises(UnsupportedError, match=words):
        fc.build(model, dry_run=True)
