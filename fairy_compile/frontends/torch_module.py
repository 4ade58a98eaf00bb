"""PyTorch modules through torch.export and TVM's importer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.graph import Graph, Weight
from fairy_compile.frontends.torch_ops import relax_module, wrong_dtype
from fairy_compile.phase import PhaseTensor

_DTYPES = ("float32", "float16", "bfloat16")


def is_torch_module(model: Any) -> bool:
    """Tell whether ``model`` is a PyTorch module, without importing PyTorch."""
    import sys

    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def import_torch(model: Any, example_inputs: Any, dynamic_shapes: Any = None) -> Graph:
    """Import a PyTorch module.

    Args:
        model: any module that `torch.export` takes; phase layers of `fairy_compile.qat` bring
            their codes.
        example_inputs: positional arguments of its ``forward``, tensors.
        dynamic_shapes: which of their dimensions may change between calls, as `torch.export` takes
            it, e.g. ``({0: torch.export.Dim("batch")},)``; default none.

    Raises:
        FairyError: the arguments do not fit the module.
        UnsupportedError: torch.export or TVM's importer cannot follow the module.
    """
    import torch

    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, Sequence) or not all(
        isinstance(value, torch.Tensor) for value in example_inputs
    ):
        raise FairyError(
            "a PyTorch module is traced with example inputs; give fc.build(module, inputs) a tuple "
            "of tensors, the positional arguments of its forward"
        )
    name = type(model).__name__
    plain, codes = _with_plain_linear(model)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                plain.eval(), tuple(example_inputs), dynamic_shapes=dynamic_shapes
            ).run_decompositions()
    except Exception as error:  # torch.export raises many kinds, with pages of advice
        raise UnsupportedError(f"torch.export cannot trace {name}: {_first_line(error)}") from error
    try:
        module = relax_module(program)
    except Exception as error:  # whatever the converters of TVM raise
        raise UnsupportedError(
            f"TVM's importer cannot convert {name}: {_last_line(error)}; rewrite that operation, "
            "or export the module to ONNX and build that"
        ) from error
    signature = program.graph_signature
    if changed := next(iter(signature.buffers_to_mutate.values()), None):
        raise UnsupportedError(
            f"{name} changes its buffer {changed} when it runs, and a compiled graph keeps no "
            "state; make it an input and an output"
        )
    if wrong := wrong_dtype(program, module["main"].ret_ty):
        raise UnsupportedError(f"TVM's importer computes {wrong} of {name}; cast it in the module")
    parameters = dict(program.named_parameters())
    targets = {s.arg.name: s.target for s in signature.input_specs if s.target in parameters}
    count = int(module["main"].attrs["num_input"])
    weights, same = {}, {}
    storages: dict[Any, str] = {}
    for var in list(module["main"].params)[count:]:
        target = targets[var.name_hint if hasattr(var, "name_hint") else var.name]
        weights[target] = _weight(target, parameters[target])
        tensor = parameters[target]
        first = storages.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), target)
        if first != target:
            same[target] = first
    main = module["main"].without_attr("params")
    module["main"] = main
    outputs = [s.arg.name for s in signature.output_specs if s.kind.name == "USER_OUTPUT"]
    return Graph(
        name=name,
        kind="torch",
        module=module,
        inputs=tuple(signature.user_inputs),
        outputs=_unique(outputs),
        weights=weights,
        directory=Path(),
        trained=_trained(model) if codes else None,
        codes=codes,
        same=same,
    )


def _trained(model: Any) -> QuantConfig | None:
    """Return what `fc.qat.prepare` trained a module for, or one inside of it; None elsewhere."""
    from fairy_compile.qat.prepare import QUANT_ATTRIBUTE

    found = (getattr(module, QUANT_ATTRIBUTE, None) for module in model.modules())
    return next((quant for quant in found if isinstance(quant, QuantConfig)), None)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of outputs, of which a graph may return one twice, and constants without any."""
    found: list[str] = []
    for number, name in enumerate(names):
        found.append(name if name and name not in found else f"{name or 'output'}_{number}")
    return tuple(found)


def _weight(name: str, tensor: Any) -> Weight:
    return Weight(
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        name.removesuffix(".weight"),
        lambda: _numpy(tensor),
    )


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _with_plain_linear(model: Any) -> tuple[Any, dict[str, PhaseTensor]]:
    """Return a module whose phase layers are plain linear ones, and the codes of these layers."""
    from fairy_compile.qat.experts import phase_experts
    from fairy_compile.qat.layers import PhaseComplexLinear, phase_layers

    layers = phase_layers(model)
    if experts := list(phase_experts(model)):
        raise UnsupportedError(
            f"{experts[0]} holds experts in phase codes; export such models with fc.qat.export"
        )
    if not layers:
        return model, {}
    complex_layers = [n for n, layer in layers.items() if isinstance(layer, PhaseComplexLinear)]
    if complex_layers:
        raise UnsupportedError(
            f"{complex_layers[0]} is natively complex; export such models with fc.qat.export"
        )
    codes = {name: layer.phase_tensor(name=name) for name, layer in layers.items()}
    return plain_copy(model), codes


def plain_copy(model: Any) -> Any:
    """Return a copy of a module with `qat.PhaseLinear` layers as plain linear ones of their values.

    The copy computes what the phase layers compute, with constant weights.
    """
    import torch

    from fairy_compile.qat.layers import phase_layers, replace_module

    plain = copy.deepcopy(model)
    for name, layer in phase_layers(plain).items():
        values = torch.from_numpy(layer.phase_tensor(name=name).dequantize())
        linear = torch.nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        linear.weight = torch.nn.Parameter(values.to(layer.weight.dtype), requires_grad=False)
        linear.bias = layer.bias
        replace_module(plain, layer, linear)
    return plain


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else repr(error)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else repr(error)
