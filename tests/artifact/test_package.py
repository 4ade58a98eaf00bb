"""Packages for MLC's apps: what `mlc_llm package` reads, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile.artifact.package import PLATFORMS, package
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.targets import load_target
from tests.artifact.conftest import TinyArtifact
from tests.tiny_models import save_model

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
NM = shutil.which("llvm-nm-22") or shutil.which("llvm-nm")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Return platform -> artifact."""
    directory = tmp_path_factory.mktemp("package")
    model = save_model(directory / "model", "llama", **SMALL)
    targets = {"ios": "iphone", "android": "android"}
    for platform, target in targets.items():
        fc.build(model, target=target, output=directory / f"tiny-{platform}", context=64)
    return {platform: directory / f"tiny-{platform}" for platform in targets}


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["ios", "android"])
def test_a_package_is_what_mlc_packages(built, tmp_path: Path, platform: str) -> None:
    report = package(built[platform], platform, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "mlc-package-config.json").read_text())
    assert config["device"] == {"ios": "iphone", "android": "android"}[platform]
    (entry,) = config["model_list"]
    assert entry["model_lib"] == report.model_lib == f"tiny_{platform}"
    assert entry["model_id"] == f"tiny-{platform}"
    assert entry["bundle_weight"] is True
    model = tmp_path / "out" / entry["model"]
    names = {path.name for path in model.iterdir()}
    assert {"mlc-chat-config.json", "tensor-cache.json", "tokenizer.json"} <= names
    assert not names & {"model.tar", "fairy.json"}
    weights = sum(path.stat().st_size for path in model.glob("params_shard_*.bin"))
    # One layer, 64 tokens of 2 heads of keys and values, 8 float16 each, and 64 MiB beside them.
    assert entry["estimated_vram_bytes"] - (64 << 20) == weights + 64 * 2 * 2 * 8 * 2
    tar = tmp_path / "out" / config["model_lib_path_for_prepare_libs"][entry["model_lib"]]
    assert tar.read_bytes() == (built[platform] / "model.tar").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["ios", "android"])
@pytest.mark.skipif(
    find_spec("ziglang") is None, reason='needs: pip install "fairy-compile[cross]"'
)
@pytest.mark.skipif(NM is None, reason="needs the Debian package llvm-22")
def test_archives_have_the_symbol_mlc_looks_for(built, tmp_path: Path, platform: str) -> None:
    report = package(built[platform], platform, tmp_path / "out", archive=True)
    archive = tmp_path / "out" / "lib" / f"lib{report.model_lib}.a"
    # As `mlc_llm package` asks, with the platform's own nm.
    listed = subprocess.run([NM, "-gU", archive], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in listed.splitlines() if " " in line}
    mark = "_" if platform == "ios" else ""  # Mach-O's before every name in C
    assert f"{mark}tiny_{platform}___tvm_ffi__library_bin" in symbols
    assert f"{mark}__tvm_ffi_tiny_{platform}_apply_bitmask_inplace" in symbols


@pytest.mark.slow
def test_refusals_name_what_to_build(built, tmp_path: Path) -> None:
    with pytest.raises(FairyError, match="built for iphone; an app for android links android or"):
        package(built["ios"], "android", tmp_path / "out")
    with pytest.raises(FairyError, match=r"--model-id is '\.\./x'; allowed"):
        package(built["ios"], "ios", tmp_path / "out", model_id="../x")
    with pytest.raises(FairyError, match="--model-id is ''; allowed"):
        package(built["ios"], "ios", tmp_path / "out", model_id="")
    assert not (tmp_path / "out").exists()
    package(built["ios"], "ios", tmp_path / "out")
    with pytest.raises(FairyError, match="add --force"):
        package(built["ios"], "ios", tmp_path / "out")
    package(built["ios"], "ios", tmp_path / "out", force=True, model_id="other")
    assert (tmp_path / "out" / "models" / "other").is_dir()


def test_unknown_platforms_are_refused(artifact: TinyArtifact, tmp_path: Path) -> None:
    with pytest.raises(FairyError, match="unknown platform 'windows'; allowed: ios, android"):
        package(artifact.directory, "windows", tmp_path / "out")


def test_an_artifact_is_not_replaced_by_its_package(artifact, tmp_path: Path) -> None:
    before = sorted(artifact.directory.iterdir())
    with pytest.raises(FairyError, match=r"the output .* is what it is made from, .*; choose"):
        package(artifact.directory, "ios", artifact.directory, force=True)
    assert sorted(artifact.directory.iterdir()) == before


def test_artifacts_for_computers_are_refused(artifact: TinyArtifact, tmp_path: Path) -> None:
    with pytest.raises(FairyError, match="was built for cpu; an app for ios links iphone: fairy_"):
        package(artifact.directory, "ios", tmp_path / "out")


def test_a_library_without_name_must_be_built_again(artifact, tmp_path: Path) -> None:
    artifact.edit_manifest(lambda m: m["target"].update(name="android-cpu"))
    with pytest.raises(FairyError, match="an earlier version built it; build again"):
        package(artifact.directory, "android", tmp_path / "out")


def test_a_library_of_anything_else_is_refused(artifact, tmp_path: Path) -> None:
    artifact.edit_manifest(lambda m: m["target"].update(name="android-cpu"))
    artifact.edit_manifest(lambda m: m.update(system_lib="tiny_model"))
    with pytest.raises(ModelFileError, match="cannot read the model library"):
        package(artifact.directory, "android", tmp_path / "out")


def test_platforms_name_targets_of_theirs() -> None:
    for phone in PLATFORMS.values():
        for name in phone.targets:
            target = load_target(name)
            assert phone.triple in target.triple
            assert target.library == "tar"
