"""Whether this machine runs an artifact, asked before its code is loaded."""

from __future__ import annotations

import platform
from pathlib import Path

from fairy_compile.artifact import Manifest
from fairy_compile.artifact.cuda_archs import runs_on
from fairy_compile.errors import UnsupportedError
from fairy_compile.runtime.amx import request_amx
from fairy_compile.runtime.library import open_device


def check_machine(manifest: Manifest, device: str | None) -> None:
    """Refuse an artifact of another system, processor or GPU.

    Args:
        manifest: of the artifact.
        device: TVM device it shall run on; None is the one it was built for.

    Raises:
        UnsupportedError: this machine cannot run it; the message says what it lacks.
    """
    check_system(manifest)
    check_features(manifest)
    check_arch(manifest, device)


def permit_amx(manifest: Manifest) -> list[str]:
    """Ask the system for AMX if a kernel needs it; return its refusal, if it refuses."""
    uses_amx = any(layer.kernel.endswith("amx") for layer in manifest.layers)
    refusal = request_amx() if uses_amx else None
    return [refusal] if refusal else []


_ELSEWHERE = {
    ".dll": ("Windows", "runs on Windows"),
    ".dylib": ("Darwin", "runs on macOS"),
    ".tar": (None, "is objects for an app's linker"),
    ".wasm": (None, "runs in browsers"),
}
"""Ending of a library -> the system that loads it, in Python's words, and what to say elsewhere."""


def check_system(manifest: Manifest) -> None:
    """Refuse a library that no system, or another one, loads."""
    system, where = _ELSEWHERE.get(Path(manifest.library).suffix, (platform.system(), ""))
    if system != platform.system():
        raise UnsupportedError(
            f"this artifact was built for target {manifest.target.name}: its library "
            f"({manifest.library}) {where}; build the model here with --target cpu"
        )


def check_arch(manifest: Manifest, name: str | None) -> None:
    """Refuse a CUDA library that has no code for a GPU, before the driver does without a word."""
    archs = manifest.target.archs
    if not archs:
        return
    device = open_device(name or manifest.target.device)
    if device.type != "cuda" or runs_on(archs, str(device.compute_version)):
        return
    raise UnsupportedError(
        f"this artifact was built for target {manifest.target.name} and holds machine code for "
        f"{', '.join(archs)}; this GPU ({device.device_name}) has compute capability "
        f"{device.compute_version}; build the model again with --target cuda, which serves GPUs "
        "from sm_80 (Ampere) on"
    )


def check_features(manifest: Manifest) -> None:
    """Refuse a CPU library whose instructions this machine lacks, before one of them runs."""
    from fairy_compile.targets import host_features

    if manifest.target.device != "cpu":
        return
    missing = set(manifest.target.features) - host_features()
    if missing:
        raise UnsupportedError(
            f"this artifact was built for target {manifest.target.name}, whose instructions this "
            f"machine lacks: {', '.join(sorted(missing))}; build the model here with --target cpu"
        )
