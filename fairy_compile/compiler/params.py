"""A library's parameters from a source's tensors: read, quantise, pack, one call at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fairy_compile.compiler.library import Param
from fairy_compile.compiler.plan import Planner
from fairy_compile.errors import FairyError
from fairy_compile.frontends.source import ModelSource
from fairy_compile.models.linear import LinearCall
from fairy_compile.op.token_int8 import guard_weight
from fairy_compile.phase import PhaseTensor

Demands = dict[str, dict[str, Any]]
"""Call name -> knobs its weights need, see `PhaseKernel.demands`."""


def call_arrays(call: LinearCall, planner: Planner, demands: Demands) -> dict[str, np.ndarray]:
    """Return all arrays of one linear call, biases included, in the call's layout.

    What the weights demand of their kernel is noted in ``demands``.
    """
    if call.experts:
        return _expert_arrays(call, planner, demands)
    source = planner.source
    if call.kernel and call.spec:
        parts = [source.phase(layer, planner.quant) for layer in call.sources]
        if call.guarded:
            parts = [guard_weight(part) for part in parts]
        if not call.guarded and (knobs := dict(call.kernel.demands(parts, call.spec))):
            demands[call.name] = knobs
        arrays = call.kernel.layout.pack(parts, call.spec)
    elif call.shared:
        arrays = {}
    else:
        weights = [
            stored_as(call.dtype, source.dense(f"{layer}.weight"), layer) for layer in call.sources
        ]
        arrays = {"weight": weights[0] if len(weights) == 1 else np.concatenate(weights)}
    if call.bias:
        biases = [source.dense(f"{layer}.bias") for layer in call.sources]
        arrays["bias"] = np.concatenate([b.astype(np.float32) for b in biases])
    return arrays


def _expert_arrays(call: LinearCall, planner: Planner, demands: Demands) -> dict[str, np.ndarray]:
    """Return the arrays of all experts, filled one expert at a time."""
    arrays = {
        suffix: np.empty(array.shape, np.dtype(array.dtype))
        for suffix, array in call.arrays().items()
    }
    codes: list[PhaseTensor] = []
    for expert, layers in enumerate(call.by_expert()):
        own = replace(call, sources=layers, experts=0)
        if call.kernel and call.spec:
            parts = [planner.source.phase(layer, planner.quant) for layer in layers]
            codes += parts
            packed = call.kernel.layout.pack(parts, call.spec)
        else:
            packed = call_arrays(own, planner, demands)
        for suffix, array in packed.items():
            arrays[suffix][expert] = array
    # One function serves all experts, with the tables that the worst of them allows.
    if call.kernel and call.spec and (knobs := dict(call.kernel.demands(codes, call.spec))):
        demands[call.name] = knobs
    return arrays


def plain_array(param: Param, source: ModelSource) -> np.ndarray:
    """Return a parameter outside linear calls (embedding, norm) in the dtype it is stored in."""
    array = source.dense(param.name)
    if array.shape != param.shape:
        raise FairyError(
            f"tensor {param.name} has shape {array.shape}; config.json implies {param.shape}"
        )
    if param.offset:
        array = array.astype(np.float32) + np.float32(param.offset)
    return stored_as(param.dtype, array, param.name)


def stored_as(dtype: str, array: np.ndarray, name: str) -> np.ndarray:
    """Return ``array`` in the dtype a library stores it in.

    Raises:
        FairyError: a value is too large for float16.
    """
    if str(array.dtype) == dtype:
        return array
    if dtype == "float16":
        largest = float(np.abs(array.astype(np.float32)).max(initial=0.0))
        if largest > np.finfo(np.float16).max:
            raise FairyError(
                f"tensor {name} has values up to {largest:g}, and float16 ends at 65504; build "
                "with --act float, which keeps float32"
            )
    return array.astype(dtype)


def iterate(
    params: list[Param], planner: Planner, demands: Demands, done: frozenset[str] = frozenset()
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) for every parameter not in ``done``, in library order.

    Only one call's arrays are in memory at a time.

    Raises:
        FairyError: a tensor is missing, damaged, non-finite or of another shape.
    """
    current: LinearCall | None = None
    arrays: dict[str, np.ndarray] = {}
    for param in params:
        if param.name in done:
            continue
        if param.call is None:
            yield param.name, plain_array(param, planner.source)
            continue
        if param.call is not current:
            arrays = {}  # let go of the last call before loading the next
            arrays = call_arrays(param.call, planner, demands)
            current = param.call
        yield param.name, arrays.pop(param.array)


def role(param: Param) -> str:
    """Return what an artifact's manifest calls the parameter: codes, scales, weight, ..."""
    if param.call is not None:
        known = ("codes", "scales", "tables", "bias")
        return next((name for name in known if param.array.endswith(name)), "weight")
    if "embed" in param.name:
        return "embedding"
    return "norm" if "norm" in param.name else "weight"
