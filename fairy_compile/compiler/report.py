"""What a build did, layer by layer: nothing is chosen silently."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fairy_compile.models.linear import LinearCall


@dataclass(frozen=True)
class LayerReport:
    """One kernel call of the model.

    Attributes:
        name: the (possibly fused) layer.
        sources: layers of the checkpoint it computes.
        shape: (out_features, in_features) of the real map; of all experts together.
        kernel: kernel family, ``dense`` for a real layer.
        layout: how its weight lies in memory.
        act: activation contract of the call.
        stages: T, 0 for a dense layer.
        terms: ``UW`` or ``W``, empty for a dense layer.
        scale: granularity of the scales, empty for a dense layer.
        bytes: size of its arrays, biases included.
        reason: why this kernel, in words.
        parts: complex output rows of each fused layer; empty for a dense layer.
        knobs: batch class -> knobs that differ from the kernel's defaults.
        demands: those of them that its weights need.
        tuned: batch class -> ``tuned``, ``near`` or ``default``: whether a schedule's record of
            this call was found, or of one near it.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int]
    kernel: str
    layout: str
    act: str
    stages: int
    terms: str
    scale: str
    bytes: int
    reason: str
    parts: tuple[int, ...] = ()
    knobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    demands: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per real weight, scales, padding and biases included."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])


@dataclass
class BuildReport:
    """The result of `fairy_compile.build`.

    Attributes:
        model: name of the source.
        family: model family.
        target: target name.
        output: artifact directory, None for a dry run.
        layers: one row per kernel call, in model order.
        param_bytes: size of all parameters.
        sizes: context, prefill chunk and batch limits, and the dtype of the KV cache, compiled in.
        seconds: stage name -> wall time.
        files: file name -> bytes.
        notes: remarks a user should read (limits, decisions).
    """

    model: str
    family: str
    target: str
    output: str | None
    layers: list[LayerReport]
    param_bytes: int
    sizes: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def kernels(self) -> dict[str, int]:
        """Return kernel name -> number of calls in one pass through the model."""
        return dict(Counter(layer.kernel for layer in self.layers))

    def tuned(self) -> dict[str, int]:
        """Return ``tuned``, ``near``, ``default`` -> functions whose knobs are from there."""
        return dict(Counter(o for layer in self.layers for o in layer.tuned.values()))

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return asdict(self) | {"kernels": self.kernels(), "tuned": self.tuned()}


def _float(dtype: str) -> str:
    return "float" if dtype == "float32" else dtype


def describe_call(call: LinearCall) -> LayerReport:
    """Return the report row of one planned call."""
    spec = call.spec
    size = sum(array.nbytes for array in call.arrays().values())
    if call.bias:
        size += 4 * sum(call.out_features)
    return LayerReport(
        name=call.name,
        sources=call.sources,
        shape=(max(1, call.experts) * sum(call.out_features), call.in_features),
        kernel=call.kernel_name,
        layout=call.layout_name,
        act=spec.contract if spec else _float(call.act_dtype),
        stages=spec.stages if spec else 0,
        terms="".join(spec.terms) if spec else "",
        scale=spec.scale if spec else "",
        bytes=size,
        reason=call.reason + (f"; {call.experts} experts" if call.experts else ""),
        parts=spec.parts if spec else (),
        knobs={batch: dict(knobs) for batch, knobs in call.knobs.items()},
        demands=dict(call.demands),
        tuned=dict(call.tuned),
    )
