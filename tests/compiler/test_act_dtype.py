"""The dtype of activations between kernels: what targets take, what reports say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import fairy_compile as fc
from fairy_compile.compiler.dtypes import range_notes
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.models import parse_config
from fairy_compile.targets import activation_dtype, activation_dtypes, load_target, target_names
from tests.tiny_models import SIZES

BRAIN = {
    "android", "android-adreno", "android-mali", "arm64-cuda", "cuda", "cuda-hopper", "iphone",
    "metal", "opencl", "vulkan", "vulkan-adreno", "vulkan-amd", "vulkan-intel", "vulkan-mali",
    "vulkan-nvidia", "windows-cuda", "windows-vulkan",
}  # fmt: skip


def test_what_targets_take() -> None:
    takes = {name: activation_dtypes(load_target(name)) for name in target_names()}
    assert {name for name, dtypes in takes.items() if "bfloat16" in dtypes} == BRAIN
    assert takes["metal"] == ("float16", "float32", "bfloat16")
    assert takes["webgpu"] == ("float16", "float32")
    assert takes["webgpu-f32"] == takes["cpu"] == takes["android-cpu"] == ("float32",)


def test_the_default_follows_target_and_contract() -> None:
    cuda = load_target("cuda")
    assert activation_dtype(cuda, "int8") == "float16"
    assert activation_dtype(cuda, "float") == "float32"
    assert activation_dtype(cuda, "float", "bfloat16") == "bfloat16"
    assert activation_dtype(load_target("cpu"), "int8") == "float32"
    assert activation_dtype(load_target("cpu"), "int8", "float32") == "float32"


@pytest.mark.parametrize(
    ("target", "dtype", "words"),
    [
        ("cpu", "bfloat16", "target cpu computes in float32; allowed: float32. Build with"),
        ("x86-64-v3", "float16", "target x86-64-v3 computes in float32; allowed: float32."),
        (
            "webgpu",
            "bfloat16",
            "--act-dtype bfloat16: target webgpu has no kernels for bfloat16 activations; allowed: "
            "float16, float32. Build with --act-dtype float32, or leave it out",
        ),
        ("webgpu-f32", "float16", "no kernels for float16 activations; allowed: float32."),
    ],
)
def test_what_a_target_lacks_is_refused(model: Path, target: str, dtype: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(words)):
        fc.build(model, target=target, act_dtype=dtype, dry_run=True)


def test_unknown_dtypes_are_refused(model: Path) -> None:
    with pytest.raises(FairyError, match="unknown --act-dtype 'half'; allowed: float16, float32"):
        fc.build(model, target="metal", act_dtype="half", dry_run=True)


def test_graphs_have_no_say(tmp_path: Path) -> None:
    with pytest.raises(FairyError, match="--act-dtype is for language models"):
        fc.build(tmp_path / "any.onnx", act_dtype="float32", dry_run=True)


@pytest.mark.parametrize("target", ["cuda", "metal"])
def test_reports_say_it(model: Path, target: str) -> None:
    half = fc.build(model, target=target, dry_run=True)
    brain = fc.build(model, target=target, act_dtype="bfloat16", dry_run=True)
    assert (brain.sizes["act_dtype"], brain.sizes["kv_dtype"]) == ("bfloat16", "float16")
    assert brain.kernels() == half.kernels()
    assert brain.param_bytes == half.param_bytes  # the embedding takes 16 bits a number


def test_float32_on_cuda_is_computed_with_float32(model: Path) -> None:
    """Not by kernels that round many rows of x, which may be more than float16 holds."""
    report = fc.build(model, target="cuda", act_dtype="float32", dry_run=True)
    assert report.kernels() == {"cuda.words": len(report.layers)}
    assert {layer.act for layer in report.layers} == {"float"}
    assert all("this call has float32 activations" in layer.reason for layer in report.layers)


def test_notes_name_the_dtype_that_holds_wide_activations() -> None:
    sizes = SIZES | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 32}
    decoder = parse_config(sizes)
    assert decoder.wide_activations

    def note(target: str, act_dtype: str = "float16") -> str:
        return "".join(range_notes(replace(decoder, act_dtype=act_dtype), load_target(target)))

    assert "--act-dtype bfloat16 holds them, --act float keeps" in note("opencl")
    assert "bfloat16" not in note("webgpu")
    assert "--act float keeps them in float32" in note("webgpu")
    assert note("opencl", "bfloat16") == note("opencl", "float32") == ""
