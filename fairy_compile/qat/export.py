"""`export`: a trained model as a packed checkpoint, with its master weights beside it.

    DIR/               packed checkpoint: phase codes, dense tensors, config.json, tokenizer files
    DIR/latents/       the same model as master weights in the Hugging Face layout

`build` and `convert` make the same codes of the second as stand in the first. config.json of the
master weights carries

    quantization_config   {quant_method: "fairy2i", latents: true, schema_version: 1,
                           config: `QuantConfig.to_json`}

Codes always come from the latents: the rule is not idempotent, so codes of already quantised
weights would be others.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from fairy_compile.artifact.files import hash_files
from fairy_compile.artifact.staging import staged_directory
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.complex_layers import PARTS as COMPLEX_PARTS
from fairy_compile.frontends.files import TOKENIZER_FILES, read_json_object
from fairy_compile.frontends.method import LATENT_QUANT_METHOD
from fairy_compile.frontends.packed import PackedLayer
from fairy_compile.frontends.packed_writer import PackedWriter
from fairy_compile.frontends.plan import recover_layer
from fairy_compile.frontends.store import TensorStore
from fairy_compile.paths import as_path
from fairy_compile.phase import quantize
from fairy_compile.phase.quantize import check_finite
from fairy_compile.qat.experts import Projection, find_experts, phase_experts
from fairy_compile.qat.layers import (
    ComplexLinear,
    PhaseComplexLinear,
    PhaseLayer,
    complex_to_real,
    phase_layers,
    plain_name,
)
from fairy_compile.qat.prepare import QUANT_ATTRIBUTE

LATENTS = "latents"
LATENTS_SCHEMA_VERSION = 1

StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        output: the packed checkpoint.
        latents: the directory of master weights.
        layers: how many layers are phase codes.
        nbytes: bytes of the packed checkpoint's weight files.
        seconds: wall-clock time.
    """

    output: Path
    latents: Path
    layers: int
    nbytes: int
    seconds: float


def export(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    force: bool = False,
    state_dict: StateDict | None = None,
    extra: Callable[[Path], None] | None = None,
) -> ExportReport:
    """Write a prepared model as a packed checkpoint with its master weights.

    Args:
        model: a transformers model after `prepare`.
        directory: the checkpoint to make; it appears complete or not at all.
        tokenizer: a transformers tokenizer, or a directory whose tokenizer files are copied.
        force: replace a checkpoint written before.
        state_dict: all weights by name, where the model itself holds shards of them (FSDP).
        extra: called with the unfinished directory, to put further files into it.

    Raises:
        FairyError: the model was not prepared, a weight holds a NaN, a layer holds phase values
            instead of master weights, or the output exists.
        UnsupportedError: the model is no transformers model.
    """
    started = time.monotonic()
    model = getattr(model, "_orig_mod", model)  # torch.compile
    quant = getattr(model, QUANT_ATTRIBUTE, None)
    if not isinstance(quant, QuantConfig) or not (phase_layers(model) or phase_experts(model)):
        raise FairyError("the model has no phase layers; call fc.qat.prepare before training it")
    layers = phase_layers(model)
    _check_tokenizer(tokenizer)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model, whose config.json `build` reads; "
            "PhaseLinear.phase_tensor gives codes of single layers, write_packed writes them"
        )
    weights = dict(state_dict if state_dict is not None else model.state_dict())
    if any(hasattr(tensor, "full_tensor") for tensor in weights.values()):  # DTensor
        raise FairyError(
            "the model holds shards of its weights; gather them in every process and give them as "
            "state_dict, e.g. accelerator.get_state_dict(model)"
        )
    parts = [f"{name}.{part}" for name, layer in layers.items() for part in _latent_parts(layer)]
    if missing := next((name for name in parts if name not in weights), None):
        raise FairyError(f"state_dict lacks {missing}; give all weights of the model, by name")
    for name, layer in layers.items():
        _check_latent(name, layer, weights, quant)
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            check_finite(_numpy(tensor), name)
    nbytes = sum(t.numel() * t.element_size() for t in weights.values())
    with staged_directory(directory, force=force, needed_bytes=2 * nbytes) as staging:
        latents = staging / LATENTS
        write_latents(model, latents, quant, tokenizer, state_dict)
        if find_experts(model):  # checkpoints hold and name them otherwise
            weights = _read_back(latents)
        _write_packed(staging, latents, model, layers, weights, quant)
        if extra is not None:
            extra(staging)
        packed = sum(p.stat().st_size for p in staging.glob("*.safetensors"))
    output = as_path("the output", directory)
    count = len(layers) + sum(len(part.names()) for part in _projections(model))
    return ExportReport(output, output / LATENTS, count, packed, time.monotonic() - started)


def _check_tokenizer(tokenizer: Any) -> None:
    if isinstance(tokenizer, str | Path):
        place = as_path("the tokenizer", tokenizer)
        if not any((place / name).is_file() for name in TOKENIZER_FILES):
            raise FairyError(
                f"{place} holds no tokenizer; give a directory with tokenizer.json, or a tokenizer "
                "of transformers"
            )
    elif tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise FairyError(
            f"tokenizer is {tokenizer!r:.80}; allowed: a tokenizer of transformers, a directory "
            "that has one, or None"
        )


def _projections(model: nn.Module) -> list[Projection]:
    """Return the projections of experts that are phase codes."""
    modules = phase_experts(model).values()
    return [part for module in modules for part in module.projections if part.plan.phase]


def _read_back(latents: Path) -> dict[str, torch.Tensor]:
    """Return the master weights as they were written, under the names of checkpoints."""
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(latents.glob("*.safetensors")):
        loaded |= load_file(file)
    return loaded


def _check_latent(name: str, layer: PhaseLayer, weights: StateDict, quant: QuantConfig) -> None:
    """Refuse latents that `build` would not quantise by the rule."""
    if not isinstance(layer, PhaseComplexLinear):
        _check_master(name, _numpy(weights[f"{name}.weight"]), quant)


def _check_master(name: str, latent: np.ndarray, quant: QuantConfig) -> None:
    check_finite(latent, f"{name}.weight")
    if recover_layer(latent, name, quant) is not None:
        raise FairyError(
            f"{name} holds phase values, not master weights, and its codes would not be those it "
            "computed with; start training from master weights or from an ordinary checkpoint, "
            "and train before exporting"
        )


def write_latents(
    model: nn.Module,
    directory: Path,
    quant: QuantConfig,
    tokenizer: Any = None,
    state_dict: StateDict | None = None,
) -> None:
    """Write master weights in the Hugging Face layout, marked as such in config.json."""
    model.save_pretrained(directory, state_dict=None if state_dict is None else dict(state_dict))
    if isinstance(tokenizer, str | Path):
        for name in TOKENIZER_FILES:
            file = as_path("the tokenizer", tokenizer) / name
            if file.is_file() and not (directory / name).exists():
                shutil.copyfile(file, directory / name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(directory)
    mark_latents(directory, quant)


def mark_latents(directory: Path, quant: QuantConfig) -> None:
    """Mark the weights of a directory, in its config.json, as master weights for ``quant``."""
    path = directory / "config.json"
    config = read_json_object(path)
    config["quantization_config"] = {
        "quant_method": LATENT_QUANT_METHOD,
        "latents": True,
        "schema_version": LATENTS_SCHEMA_VERSION,
        "config": quant.to_json(),
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_packed(
    directory: Path,
    latents: Path,
    model: nn.Module,
    layers: Mapping[str, PhaseLayer],
    weights: StateDict,
    quant: QuantConfig,
) -> None:
    """Write the packed checkpoint of the master weights in ``latents``."""
    config = read_json_object(latents / "config.json")
    del config["quantization_config"]
    table, latent_names = {}, set()
    for name, layer in layers.items():
        terms = ("W",) if isinstance(layer, PhaseComplexLinear) else ("U", "W")
        shape = (layer.out_features, layer.in_features)
        if terms == ("W",):
            shape = (2 * shape[0], 2 * shape[1])
        table[name] = PackedLayer(layer.stages, terms, layer.scale, shape)
        latent_names.update(f"{name}.{part}" for part in _latent_parts(layer))
    for part in _projections(model):
        for name in part.names():
            table[name] = PackedLayer(part.plan.stages, ("U", "W"), quant.scale, part.shape)
            latent_names.add(f"{name}.weight")
    stored = set(_stored_names(latents))
    dense = {
        name: tensor
        for name, tensor in weights.items()
        if name in stored and name not in latent_names
    }
    _join_complex(model, dense)
    files = sorted(path for path in latents.iterdir() if path.is_file())
    with PackedWriter(
        directory,
        config,
        quant=quant,
        layers=table,
        dense={n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in dense.items()},
        tokenizer_files=[path for path in files if path.name in TOKENIZER_FILES],
        source_sha256=hash_files({path.name: path for path in files}),
    ) as writer:
        for name, layer in layers.items():
            parts = [weights[f"{name}.{part}"] for part in _latent_parts(layer)]
            latent: Any = parts[0] if len(parts) == 1 else tuple(parts)
            writer.add_layer(name, layer.phase_tensor(latent, name))
        for part in _projections(model):
            for name in part.names():
                latent = _numpy(weights[f"{name}.weight"])
                _check_master(name, latent, quant)
                codes = quantize(latent, part.plan.stages, scale=quant.scale, name=name)
                writer.add_layer(name, codes)
        for name, tensor in dense.items():
            writer.add_dense(name, _numpy(tensor))


def _join_complex(model: nn.Module, dense: dict[str, torch.Tensor]) -> None:
    """Give complex layers that stay dense the form `build` reads, the real ``<layer>.weight``."""
    for path, module in model.named_modules():
        names = [f"{plain_name(path)}.{part}" for part in COMPLEX_PARTS]
        if isinstance(module, ComplexLinear) and names[0] in dense:
            parts = [dense.pop(name) for name in names]
            dense[f"{plain_name(path)}.weight"] = complex_to_real(*parts)


def _latent_parts(layer: PhaseLayer) -> tuple[str, ...]:
    return COMPLEX_PARTS if isinstance(layer, PhaseComplexLinear) else ("weight",)


def _stored_names(latents: Path) -> list[str]:
    """Return the tensors that `save_pretrained` kept: of tied ones only the first."""
    return list(TensorStore.open(latents).infos)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as NumPy, bfloat16 included."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
