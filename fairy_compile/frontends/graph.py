"""`Graph`: a whole network imported as one Relax function, and its weights as a `ModelSource`.

Models in `fairy_compile.models` are written by hand and read weights by name. Any other network
comes as a graph of its own (ONNX, torch.export): one function whose first parameters are the
graph's inputs and whose last are its weights. `compiler.graph_layers` finds the linear layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends.plan import (
    RECOVERED,
    LayerPlan,
    plan_linear,
    quantize_layer,
    recover_layer,
)
from fairy_compile.frontends.quant_json import settle_own
from fairy_compile.phase import PhaseTensor
from fairy_compile.phase.quantize import check_finite

if TYPE_CHECKING:
    from tvm import IRModule

GraphKind = Literal["onnx", "torch"]


@dataclass(frozen=True)
class Weight:
    """One weight of a graph.

    Attributes:
        shape: dimensions as the graph stores them.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        layer: what to call the linear layer that reads it.
        read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: str
    layer: str
    read: Callable[[], np.ndarray]


@dataclass
class Graph:
    """An imported network.

    Attributes:
        name: what reports call it.
        kind: where it came from.
        module: Relax module with the function ``main``; its parameters are the inputs, then the
            weights. Dimensions that may change between calls are symbols.
        inputs, outputs: names in the order ``main`` takes and returns them.
        weights: name -> `Weight`, in the order of the parameters after the inputs.
        directory: where its files lie.
        files: name -> SHA-256 of its files.
        trained: what it was trained for by `fairy_compile.qat`, where it tells.
        codes: layer -> codes it was trained with, where the graph came with them.
        same: weight -> an earlier weight that is the same tensor.
    """

    name: str
    kind: GraphKind
    module: IRModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, Weight]
    directory: Path
    files: dict[str, str] = field(default_factory=dict)
    trained: QuantConfig | None = None
    codes: dict[str, PhaseTensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """A constant matrix that linear layers of a graph multiply with.

    Attributes:
        layer: unique name.
        weight: name of the graph's weight, "" for a constant inside the graph.
        shape: (out_features, in_features).
        dtype: of the graph's weight.
        dense: returns the matrix, (out_features, in_features).
        calls: how many nodes of the graph multiply with it.
    """

    layer: str
    weight: str
    shape: tuple[int, int]
    dtype: str
    dense: Callable[[], np.ndarray]
    calls: int = 1


class GraphSource:
    """A `ModelSource` over the matrices and the other weights of a graph.

    A layer's ``<layer>.weight`` is the matrix as a linear layer reads it; weights that are read by
    other operators keep the graph's names and shapes.

    Args:
        graph: the network.
        matrices: its linear layers.
        stored: weight -> name of the tensor that holds it as other operators read it.
    """

    quant: QuantConfig | None = None

    def __init__(self, graph: Graph, matrices: Sequence[Matrix], stored: Mapping[str, str]) -> None:
        self.directory = graph.directory
        self.config: dict[str, Any] = {}
        self.kind = graph.kind
        self.tied: dict[str, str] = {}
        self._graph = graph
        self._matrices = {f"{m.layer}.weight": m for m in matrices}
        self._others = {name: graph.weights[weight] for weight, name in stored.items()}

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [*self._matrices, *self._others]

    def _tensor(self, name: str) -> Matrix | Weight:
        return self._matrices[name] if name in self._matrices else self._others[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """Return ``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        return self._tensor(name).dtype

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor, checked finite."""
        tensor = self._tensor(name)
        array = np.ascontiguousarray(
            tensor.dense() if isinstance(tensor, Matrix) else tensor.read()
        )
        check_finite(array, name)
        return array

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """See `ModelSource.settle`: ``auto`` is ``alternating``, but for a trained graph."""
        if calibrated or by_budget or asked.method == "gptq":
            flag = "--calibrate" if calibrated else "--bits" if by_budget else "--method gptq"
            raise FairyError(
                f"{flag} is for language models, whose text it can run; leave it out for a graph, "
                "or train with fc.qat"
            )
        trained = self._graph.trained
        if trained is not None:
            own = settle_own(trained, asked)
            return own, (
                f"the graph was trained for {own.quant}, scales per {own.scale}, and brings its "
                "codes"
            )
        if asked.method != "auto":
            return asked, f"method {asked.method}, as asked for"
        used = dataclasses.replace(asked, method="alternating")
        return used, (
            "method alternating: nothing says that the weights were trained for the phase rule; "
            "fc.qat.export_onnx marks those that were"
        )

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what `phase` would return, or why the layer stays dense."""
        found = plan_linear(layer, self._matrices[f"{layer}.weight"].shape, quant)
        ready = self._graph.codes.get(layer)
        if found.phase and ready is not None:
            found = LayerPlan(True, ready.stages, ready.terms, ready.scale, "codes of training")
        elif found.phase and self._graph.codes and self._graph.trained is not None:
            found = LayerPlan.dense("dense in training")
        elif found.phase and self._graph.trained is not None:
            found = dataclasses.replace(found, reason=RECOVERED)
        return found

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Return a layer as phase codes.

        Raises:
            FairyError: the graph is marked as trained for phase codes, and the layer's weight
                does not hold phase values.
        """
        if (ready := self._graph.codes.get(layer)) is not None:
            return ready
        weight = self.dense(f"{layer}.weight")
        if self._graph.trained is None:
            return quantize_layer(weight, layer, quant)[0]
        found = recover_layer(weight, layer, quant)
        if found is None:
            raise FairyError(
                f"{layer} does not hold the phase values that the graph is marked to hold; export "
                f"it again with fc.qat.export_onnx, or keep the layer dense with --exempt {layer}"
            )
        return found

    def tokenizer_files(self) -> list[Path]:
        """Return none: a graph has no tokenizer."""
        return []

    def sha256(self) -> Mapping[str, str]:
        """Return file name -> SHA-256 (hex) of every file of the source."""
        return self._graph.files
