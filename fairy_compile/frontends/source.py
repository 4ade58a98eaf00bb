"""`ModelSource`: a model's weights by name, whatever it is stored as, and how to open one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends.files import TOKENIZER_FILES, member, read_config
from fairy_compile.frontends.plan import LayerPlan
from fairy_compile.frontends.store import SAFETENSORS, TORCH, read_weight_map
from fairy_compile.paths import as_path
from fairy_compile.phase import PhaseTensor

__all__ = ["LayerPlan", "ModelSource", "open_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


class ModelSource(Protocol):
    """Weights by name, read one tensor at a time.

    Tensors carry their Hugging Face names. A layer is a tensor's name without ``.weight``.

    Attributes:
        directory: where config.json and the tokenizer's files lie.
        origin: what was opened: the directory, or a file.
        config: the parsed ``config.json``.
        kind: ``"huggingface"`` (dense weights), ``"packed"`` (phase codes, see `packed`) or
            ``"gguf"`` (phase codes, see `gguf`).
        quant: the quantisation a packed checkpoint was made with, else None.
        tied: name -> stored tensor of weights that exist only as another tensor's.
        makes_codes: whether `phase` knows more of a layer than `quantize_layer` makes of `dense`.
    """

    directory: Path
    origin: Path
    config: dict[str, Any]
    kind: Literal["huggingface", "packed", "gguf"]
    quant: QuantConfig | None
    tied: dict[str, str]
    makes_codes: bool

    def names(self) -> list[str]:
        """Return all tensor names; a phase-coded layer appears as ``<layer>.weight``."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a phase-coded layer the real one, (2n, 2m)."""

    def dtype(self, name: str) -> str:
        """Return ``"float32"``, ``"float16"`` or ``"bfloat16"`` (phase-coded: ``"float32"``)."""

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor as stored, checked finite; a phase-coded layer dequantised, float32.

        Raises:
            FairyError: there is no such tensor, or it holds a NaN or infinity.
            ModelFileError: its file is damaged.
        """

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Return what a request means for this model, and a sentence on it where there is a choice.

        A method ``"auto"`` comes back decided. A checkpoint made by quantisation-aware training or
        `convert` brings its own settings, whatever was asked for, but for activations and exempt
        layers.

        Args:
            asked: the request.
            calibrated: there is calibration text.
            by_budget: T is chosen under a budget of bits.

        Raises:
            FairyError: the method does not go with the rest of the request.
        """

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what `phase` would return, or why the layer stays dense; reads no data."""

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Return a layer as phase codes.

        A Hugging Face source quantises ``<layer>.weight`` as ``quant`` says. A packed one returns
        its stored codes: their T and granularity were fixed when it was made, whatever ``quant``
        says now.

        Raises:
            FairyError: `plan` says that the layer stays dense, or `dense` fails.
        """

    def tokenizer_files(self) -> list[Path]:
        """Return the tokenizer, chat template and generation files that are there."""

    def sha256(self) -> dict[str, str]:
        """Return file name -> SHA-256 (hex) of every file of the source."""


def open_source(model: str | Path, *, revision: str | None = None) -> ModelSource:
    """Open a model directory, a GGUF file or a model of the Hugging Face hub.

    Args:
        model: a directory, a Fairy2i model's ``.gguf`` file, or a hub id ``org/name``; an existing
            path always wins.
        revision: branch, tag or commit of a hub model.

    Raises:
        FairyError: there is neither such a directory nor such a hub model, the directory is an
            artifact, or a revision is asked for of a directory.
        ModelFileError: the directory is not a readable model.
    """
    from fairy_compile.frontends import complex_layers, learned_scales
    from fairy_compile.frontends.gguf import GgufSource
    from fairy_compile.frontends.huggingface import HuggingFaceSource
    from fairy_compile.frontends.packed import PackedSource, is_packed

    path = as_path("the model", model)
    if model == "":  # no way to say "."
        raise FairyError(
            "the model's name is empty: there is no directory without one, and a model of the "
            "Hugging Face hub is written org/name"
        )
    if path.is_dir():
        if revision is not None:
            raise _refuse_revision(revision, path, "directory")
        directory = path
    elif path.suffix.lower() == ".onnx":
        raise FairyError(
            f"{path} is an ONNX file, which only `fairy_compile build` takes; give a model "
            "directory here"
        )
    elif path.suffix.lower() == ".gguf":
        if revision is not None:
            raise _refuse_revision(revision, path, "file")
        if not path.is_file():
            if path.exists() or path.is_symlink():
                raise FairyError(
                    f"{path} is no regular file, or a link to none; give the GGUF file itself"
                )
            raise FairyError(f"no model {str(model)!r}: there is no file {path.absolute()}")
        return GgufSource(path)
    elif path.is_file():
        raise FairyError(
            f"{path} is a file; give the model's directory, which holds config.json and "
            "safetensors files, or a Fairy2i model's GGUF file, whose name ends in .gguf"
        )
    elif isinstance(model, str) and _HUB_ID.fullmatch(model):
        directory = _download(model, revision)
    else:
        raise FairyError(
            f"no model {str(model)!r}: there is no directory {path.absolute()}, and a model of the "
            "Hugging Face hub is written org/name"
        )
    _refuse_artifact(directory)
    config = read_config(directory)
    if is_packed(config):
        return PackedSource(directory, config)
    if config.get("model_type") in complex_layers.MODEL_TYPES:
        return complex_layers.ComplexSource(directory, config)
    source = HuggingFaceSource(directory, config)
    if any(name.endswith(learned_scales.SUFFIX) for name in source.names()):
        return learned_scales.LearnedScaleSource(directory, config)
    return source


def _refuse_revision(revision: str, path: Path, what: str) -> FairyError:
    return FairyError(
        f"--revision {revision} goes with a model of the Hugging Face hub, and {path} is a {what}; "
        "leave it out"
    )


def _refuse_artifact(directory: Path) -> None:
    """Tell who gives an artifact where a model is wanted that he has the result already."""
    from fairy_compile.artifact.manifest import MANIFEST, Manifest

    if not (directory / MANIFEST).is_file() or (directory / "config.json").is_file():
        return
    manifest = Manifest.load(directory)
    raise FairyError(
        f"{directory} is an artifact already, built for target {manifest.target.name}; use it, for "
        f"example with `fairy_compile verify`, or give the model it was built from "
        f"({manifest.source.name})"
    )


def _download(hub_id: str, revision: str | None) -> Path:
    """Bring the files of a hub model into the hub's cache and return their directory.

    Small files come first: the index among them says which shards belong to the model, so that
    second copies in other formats (``consolidated.safetensors``, ``.bin``) are not downloaded.
    """
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(
                snapshot_download(
                    hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
                )
            )
        # The errors of the hub's client and of the HTTP library below it, which changes between
        # its versions, share no other base class.
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise FairyError(
                f"no model {hub_id!r}: there is no directory {Path(hub_id).absolute()}, and the "
                f"Hugging Face hub answers: {reason or type(error).__name__}"
            ) from error

    directory = fetch(["*.json", *(name for name in TOKENIZER_FILES if "json" not in name)])
    for weights in (SAFETENSORS, TORCH):
        index = member(directory, f"{weights}.index.json")
        # A model in one file has no index.
        shards = sorted(set(read_weight_map(index).values())) if index else [weights]
        directory = fetch(shards)
        if any(member(directory, shard) for shard in shards):
            return directory
    raise ModelFileError(
        f"the hub model {hub_id!r} has neither {SAFETENSORS} nor {TORCH}; of one in GGUF files, "
        "download a file and give its path"
    )
