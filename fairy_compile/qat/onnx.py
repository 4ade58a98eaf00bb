"""`export_onnx`: a trained model as an ONNX file that any runtime computes as it was trained."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fairy_compile.config import QuantConfig, is_whole
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.onnx_file import MAX_OPSET, MIN_OPSET, TRAINED_KEY
from fairy_compile.frontends.plan import recover_layer
from fairy_compile.frontends.torch_module import plain_copy
from fairy_compile.paths import as_path
from fairy_compile.qat.experts import phase_experts
from fairy_compile.qat.layers import PhaseComplexLinear, PhaseLinear, phase_layers
from fairy_compile.qat.prepare import QUANT_ATTRIBUTE

DEFAULT_OPSET = 18


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int = DEFAULT_OPSET,
    force: bool = False,
) -> Path:
    """Write a prepared model as ONNX, its phase layers as matrices of their quantised values.

    `fairy_compile.build` takes these values apart into the very codes the layers computed with; any
    other ONNX runtime runs the model as it was trained. The file is marked with the quantisation.

    Args:
        model: a module after `prepare`.
        path: the file to write, ending in ``.onnx``; it appears complete or not at all.
        example_inputs: positional arguments of its forward.
        input_names, output_names: names in the file; default those PyTorch gives.
        dynamic_shapes: dimensions that may change, as `torch.onnx.export` takes them.
        opset: ONNX operator set.
        force: replace the file if it exists.

    Raises:
        FairyError: the model was not prepared, holds a NaN, or has a layer whose values do not
            tell its codes (a few rows of few weights); or the file exists.
        UnsupportedError: a natively complex layer, or PyTorch cannot export the model.
    """
    path = as_path("the output", path)
    quant = getattr(model, QUANT_ATTRIBUTE, None)
    if not isinstance(quant, QuantConfig) or not phase_layers(model):
        raise FairyError("the model has no phase layers; call fc.qat.prepare before training it")
    layers = phase_layers(model)
    if path.suffix != ".onnx":
        raise FairyError(f"the output is {path}; expected a name that ends in .onnx")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"is not in a directory: {path.parent}"
        raise FairyError(f"the output {path} {what}; name a file in a directory that exists")
    if path.exists() and not force:
        raise FairyError(f"the output {path} exists; add force=True to replace it")
    if not is_whole(opset) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise FairyError(f"opset is {opset!r}; allowed: {MIN_OPSET} to {MAX_OPSET}")
    if experts := list(phase_experts(model)):
        raise UnsupportedError(
            f"{experts[0]} holds experts in phase codes; export such models with fc.qat.export"
        )
    for name, layer in layers.items():
        _check_recoverable(name, layer, quant)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence) or not all(
        isinstance(value, torch.Tensor) for value in example_inputs
    ):
        seen = " ".join(repr(example_inputs).split())  # arrays take several lines
        raise FairyError(
            f"example_inputs is {seen:.80}; allowed: a tensor, or a tuple of tensors, "
            "the positional arguments of the model's forward"
        )
    written = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        program = _export(
            plain_copy(model).eval(),
            tuple(example_inputs),
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
        )
        program.model.metadata_props[TRAINED_KEY] = json.dumps(quant.to_json())
        program.save(str(written), external_data=False)
        os.replace(written, path)
    except OSError as error:
        raise FairyError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        written.unlink(missing_ok=True)
    return path


def _export(model: nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)
    except ModuleNotFoundError as error:
        raise FairyError(
            f"exporting to ONNX needs the package {error.name}; install it with "
            "pip install 'fairy_compile[onnx]'"
        ) from error
    except Exception as error:  # PyTorch raises many kinds, with pages of advice
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), repr(cause))
        raise UnsupportedError(f"PyTorch cannot export the model to ONNX: {reason}") from error


def _check_recoverable(
    name: str, layer: PhaseLinear | PhaseComplexLinear, quant: QuantConfig
) -> None:
    if isinstance(layer, PhaseComplexLinear):
        raise UnsupportedError(f"{name} is natively complex; export such models with fc.qat.export")
    codes = layer.phase_tensor(name=name)
    values = codes.dequantize()
    found = recover_layer(values, name, quant)
    if found is None or not np.allclose(found.dequantize(), values, rtol=1e-5, atol=1e-7):
        raise FairyError(
            f"{name} ({values.shape[0]} x {values.shape[1]}, T = {codes.stages}, scales per "
            f"{codes.scale}) has too few weights for its values to tell its codes, so ONNX cannot "
            f"carry it; keep it dense in training: QuantConfig(exempt=({name!r},))"
        )
