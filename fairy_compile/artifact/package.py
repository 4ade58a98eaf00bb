"""Packages for MLC's phone apps: what ``mlc_llm package`` needs to put a model into an app.

A package is a directory that can be moved to the machine that builds the app:

    mlc-package-config.json   names the two below by paths relative to it
    models/ID/                MLC model directory: configuration, tokenizer, weights
    lib/NAME.tar              objects of the model library, ``system://NAME``
    lib/libNAME.a             the same as a static library, if asked for
    fairy-package.json        what it was made of
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from fairy_compile.artifact.files import path_problem
from fairy_compile.artifact.manifest import Manifest
from fairy_compile.artifact.schema import dump_json, show
from fairy_compile.artifact.staging import PACKAGE, check_apart, check_output, staged_directory
from fairy_compile.artifact.system_lib import check_system_lib, read_system_lib
from fairy_compile.artifact.tensor_cache import ITEMSIZE
from fairy_compile.artifact.verify import VerifyReport, verify
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.paths import as_path
from fairy_compile.targets import load_target

PACKAGE_CONFIG = "mlc-package-config.json"
MODELS, LIBRARIES = "models", "lib"


@dataclass(frozen=True)
class Platform:
    """A phone platform.

    Attributes:
        name: as users say it.
        mlc_device: as ``mlc-package-config.json`` says it.
        triple: what the LLVM triples of its CPU code hold.
        targets: targets to build for.
        app_device: the TVM device MLC's app opens.
    """

    name: str
    mlc_device: str
    triple: str
    targets: tuple[str, ...]
    app_device: str


PLATFORMS = {
    p.name: p
    for p in (
        Platform("ios", "iphone", "apple-ios", ("iphone",), "metal"),
        Platform(
            "android",
            "android",
            "linux-android",
            ("android", "android-adreno", "android-mali", "android-cpu"),
            "opencl",
        ),
    )
}

# What the engine takes beside weights and cache: embeddings and hidden states of a prefill chunk,
# logits, work space of attention; MLC's own estimate of these for one sequence.
_WORKSPACE_BYTES = 64 << 20


@dataclass(frozen=True)
class PackageReport:
    """What `package` wrote.

    Attributes:
        output: the directory.
        platform: ``ios`` or ``android``.
        model_id: name of the model in the app.
        model_lib: name of the library in the app, ``system://`` before it.
        estimated_vram_bytes: memory the app shows and holds against that of the phone.
        bytes: size of the package.
        notes: what else to know.
    """

    output: str
    platform: str
    model_id: str
    model_lib: str
    estimated_vram_bytes: int
    bytes: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return everything as plain JSON values."""
        return asdict(self)


def package(
    directory: Path | str,
    platform: str,
    output: Path | str,
    *,
    model_id: str | None = None,
    archive: bool = False,
    force: bool = False,
) -> PackageReport:
    """Write the package of an artifact for MLC's apps.

    Args:
        directory: artifact built for a phone.
        platform: a key of `PLATFORMS`.
        output: directory to write.
        model_id: name of the model in the app; default the artifact's directory.
        archive: also write ``lib/libNAME.a``; needs llvm-ar or zig.
        force: replace a package written before.

    Raises:
        FairyError: the artifact is for another machine, cannot be linked, or is damaged; or
            ``output`` would replace it.
    """
    directory = as_path("the artifact", directory)
    phone = PLATFORMS.get(platform)
    if phone is None:
        raise FairyError(f"unknown platform {platform!r}; allowed: {', '.join(PLATFORMS)}")
    check_output(output, force=force)
    check_apart(output, directory)
    archiver = _archiver() if archive else None
    checked = verify(directory)
    manifest = checked.manifest
    _check_linkable(directory, manifest, phone)
    model_id = directory.resolve().name if model_id is None else model_id
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,95}", model_id):
        raise FairyError(
            f"--model-id is {model_id!r}; allowed: letters, digits and _ . + - (at most 96, first "
            "a letter or digit)"
        )
    memory = _estimated_bytes(manifest)
    with staged_directory(output, force=force, needed_bytes=checked.bytes) as staged:
        model = staged / MODELS / model_id
        _copy(directory, model, [n for n in manifest.files if n != manifest.library])
        library = staged / LIBRARIES / f"{manifest.system_lib}.tar"
        library.parent.mkdir()
        shutil.copyfile(directory / manifest.library, library)
        if archiver:
            _write_archive(library, archiver)
        dump_json(staged / PACKAGE_CONFIG, _config(phone, manifest, model_id, memory))
        dump_json(staged / PACKAGE, _description(phone, manifest, model_id))
        size = sum(p.stat().st_size for p in staged.rglob("*") if p.is_file())
    return PackageReport(
        output=str(output),
        platform=phone.name,
        model_id=model_id,
        model_lib=manifest.system_lib,
        estimated_vram_bytes=memory,
        bytes=size,
        notes=_notes(phone, checked),
    )


def _check_linkable(directory: Path, manifest: Manifest, phone: Platform) -> None:
    target = load_target(manifest.target.name)
    again = f"fairy_compile build MODEL --target {phone.targets[0]} -o DIR"
    if phone.triple not in target.triple:
        raise FairyError(
            f"{directory} was built for {target.name}; an app for {phone.name} links "
            f"{' or '.join(phone.targets)}: {again}"
        )
    if not manifest.system_lib:
        raise FairyError(
            f"the library of {directory} has no name of its own, an earlier version built it; "
            f"build again: {again}"
        )
    problems = check_system_lib(
        read_system_lib(directory / manifest.library),
        manifest.system_lib,
        device=manifest.target.device,
        triple=target.triple,
        functions=manifest.functions,
    )
    if problems:
        more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ModelFileError(f"{manifest.library}: {problems[0]}{more}; build again: {again}")


def _copy(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        if problem := path_problem(name):  # `verify` refuses it; what writes files looks itself
            raise ModelFileError(f"the artifact names the file {show(name)}: {problem}")
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, path)


def _estimated_bytes(manifest: Manifest) -> int:
    """Return what one sequence of full length takes: weights, its keys and values, work space."""
    weights = 0
    for param in manifest.params:
        size = ITEMSIZE[param.dtype]
        for dim in param.shape:
            size *= dim
        weights += size
    sizes = manifest.metadata["kv_cache"]
    heads = sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    itemsize = ITEMSIZE.get(str(manifest.model.sizes.get("kv_dtype")), 2)
    tokens = max(0, manifest.metadata["context_window_size"])
    return weights + 2 * heads * itemsize * tokens + _WORKSPACE_BYTES


def _config(phone: Platform, manifest: Manifest, model_id: str, memory: int) -> dict[str, object]:
    """Return ``mlc-package-config.json`` as ``mlc_llm package`` reads it."""
    name = manifest.system_lib
    return {
        "device": phone.mlc_device,
        "model_list": [
            {
                "model": f"{MODELS}/{model_id}",
                "model_id": model_id,
                "model_lib": name,
                "estimated_vram_bytes": memory,
                "bundle_weight": True,
            }
        ],
        "model_lib_path_for_prepare_libs": {name: f"{LIBRARIES}/{name}.tar"},
    }


def _description(phone: Platform, manifest: Manifest, model_id: str) -> dict[str, object]:
    return {
        "fairy_compile": manifest.fairy_compile,
        "platform": phone.name,
        "model_id": model_id,
        "model_lib": manifest.system_lib,
        "source": asdict(manifest.source),
        "quant": manifest.quant,
        "target": asdict(manifest.target),
    }


def _notes(phone: Platform, checked: VerifyReport) -> tuple[str, ...]:
    notes = list(checked.warnings)
    device = checked.manifest.target.device
    if device != phone.app_device:
        notes.append(
            f"MLC's app opens the device {phone.app_device}; this model runs on {device}: let the "
            f"app open {device} (JSONFFIEngine.initBackgroundEngine)"
        )
    return tuple(notes)


def _archiver() -> list[str]:
    """Return a command like ``ar`` that knows the objects of phones.

    Raises:
        FairyError: none is installed.
    """
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "ar"]
    for program in ("llvm-ar", "zig"):
        if found := shutil.which(program):
            return [found, "ar"] if program == "zig" else [found]
    raise FairyError(
        "--archive needs llvm-ar or zig, and neither is installed; the quickest is: pip install "
        '"fairy-compile[cross]"'
    )


def _write_archive(library: Path, command: list[str]) -> None:
    """Write ``libNAME.a`` beside ``NAME.tar``, with an index of symbols."""
    archive = library.with_name(f"lib{library.stem}.a")
    with tempfile.TemporaryDirectory(prefix="fairy-") as directory:
        names = []
        for obj in read_system_lib(library):
            (Path(directory) / obj.name).write_bytes(obj.data)
            names.append(obj.name)
        done = subprocess.run(
            [*command, "rcsD", str(archive.resolve()), *names],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FairyError(f"writing the static library failed: {command[0]}: {lines[-1]}")
