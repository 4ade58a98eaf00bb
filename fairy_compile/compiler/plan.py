"""Which kernel computes which layer, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fairy_compile.config import QuantConfig, check_choice
from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.source import LayerPlan, ModelSource
from fairy_compile.kernels import FAMILIES
from fairy_compile.kernels.base import PhaseKernel
from fairy_compile.models.linear import LinearCall
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.targets import Target


def pick_kernel(spec: PhaseSpec, target: Target) -> tuple[PhaseKernel, PhaseSpec, str]:
    """Return the first of the target's kernels that serves ``spec``, and the reason in words.

    A kernel family that only computes with float activations may serve an ``int8`` request: that
    is more accurate than what was asked for, and the reason says so.

    Raises:
        UnsupportedError: no kernel of the target can serve the call.
    """
    refusals: dict[str, str] = {}
    for contract in dict.fromkeys((spec.act, "float")):
        wanted = replace(spec, act=contract)
        for family in target.kernels:
            check_choice(f"kernel family of target {target.name}", family, list(FAMILIES))
            for kernel in FAMILIES[family]:
                refusal = kernel.unsupported(wanted, target)
                if refusal is None:
                    return kernel, wanted, _in_words(refusals) or "first choice of the target"
                # Members of a family that refuse for one reason are named by the family.
                refusals[refusal] = family if refusal in refusals else kernel.name
    raise UnsupportedError(
        f"target {target.name} has no kernel for {spec.describe()}: {_in_words(refusals)}; "
        "try --act float or another --target"
    )


def _in_words(refusals: dict[str, str]) -> str:
    return "; ".join(f"not {name}: {reason}" for reason, name in refusals.items())


class Planner:
    """Answers a model's questions about its linear layers from a source's headers alone."""

    def __init__(self, source: ModelSource, quant: QuantConfig, target: Target) -> None:
        self.source = source
        self.quant = quant
        self.target = target
        self.calls: list[LinearCall] = []
        self.layer_plans: dict[str, LayerPlan] = {}
        self.layer_quants: dict[str, QuantConfig] = {}
        self._names = frozenset(source.names())

    def dtype(self, name: str) -> str:
        """See `LinearPlanner.dtype`."""
        return self.source.dtype(name)

    def linear(
        self,
        name: str,
        sources: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        bias: bool = False,
    ) -> list[LinearCall]:
        """See `LinearPlanner.linear`: neighbours that agree on everything share a call."""
        for layer, rows in zip(sources, out_features, strict=True):
            self._check_shape(f"{layer}.weight", (rows, in_features))
            if bias:
                self._check_shape(f"{layer}.bias", (rows,))
            self._plan_layer(layer, self.quant)
        groups: list[list[int]] = []
        for i, layer in enumerate(sources):
            if groups and self._fusable(sources[groups[-1][-1]], layer):
                groups[-1].append(i)
            else:
                groups.append([i])
        calls = []
        for group in groups:
            layers = tuple(sources[i] for i in group)
            rows = tuple(out_features[i] for i in group)
            own_name = name if len(groups) == 1 else layers[0] if len(layers) == 1 else name
            calls.append(self._call(own_name, layers, in_features, rows, bias))
        if len(groups) > 1:
            note = "; not fused with its neighbours: they differ in form"
            calls = [replace(c, reason=c.reason + note) for c in calls]
        self.calls.extend(calls)
        return calls

    def head(
        self, name: str, embedding: str, in_features: int, vocab: int, tied: bool
    ) -> list[LinearCall]:
        """See `LinearPlanner.head`.

        A checkpoint with a weight of its own for the head is like any other layer. A tied head is
        a linear layer over the embedding's weight, quantised as one unless it is exempt; then it
        reads the embedding itself.
        """
        if f"{name}.weight" in self._names:
            return self.linear(name, [name], in_features, [vocab])
        if not tied:
            raise ModelFileError(
                f"the checkpoint has no tensor {name}.weight and its config.json does not set "
                "tie_word_embeddings"
            )
        self._check_shape(f"{embedding}.weight", (vocab, in_features))
        plan = self._plan_layer(embedding, self.quant.for_layer(name))
        if plan.phase:
            call = self._call(name, (embedding,), in_features, (vocab,), bias=False)
        else:
            call = LinearCall(
                name=name,
                sources=(embedding,),
                in_features=in_features,
                out_features=(vocab,),
                bias=False,
                reason=f"{plan.reason}; reads the tied embedding",
                dtype=self.source.dtype(f"{embedding}.weight"),
                shared=f"{embedding}.weight",
            )
        self.calls.append(call)
        return [call]

    def _plan_layer(self, layer: str, quant: QuantConfig) -> LayerPlan:
        self.layer_quants[layer] = quant
        self.layer_plans[layer] = self.source.plan(layer, quant)
        return self.layer_plans[layer]

    def _fusable(self, first: str, second: str) -> bool:
        a, b = self.layer_plans[first], self.layer_plans[second]
        if a.phase and b.phase:
            return (a.stages, a.terms, a.scale) == (b.stages, b.terms, b.scale)
        dtypes = {self.source.dtype(f"{layer}.weight") for layer in (first, second)}
        return not a.phase and not b.phase and len(dtypes) == 1

    def _call(
        self,
        name: str,
        layers: tuple[str, ...],
        in_features: int,
        rows: tuple[int, ...],
        bias: bool,
    ) -> LinearCall:
        plan = self.layer_plans[layers[0]]
        common: dict[str, Any] = {
            "name": name,
            "sources": layers,
            "in_features": in_features,
            "out_features": rows,
            "bias": bias,
        }
        if not plan.phase:
            dtype = self.source.dtype(f"{layers[0]}.weight")
            return LinearCall(**common, reason=plan.reason, dtype=dtype)
        spec = PhaseSpec(
            parts=tuple(n // 2 for n in rows),
            m=in_features // 2,
            stages=plan.stages,
            terms=plan.terms,
            scale=plan.scale,
            act=self.quant.act,
        )
        kernel, spec, reason = pick_kernel(spec, self.target)
        return LinearCall(**common, reason=reason, spec=spec, kernel=kernel)

    def _check_shape(self, name: str, want: tuple[int, ...]) -> None:
        if name not in self._names:
            raise ModelFileError(f"the checkpoint has no tensor {name}, which config.json implies")
        seen = tuple(self.source.shape(name))
        if seen != want:
            raise ModelFileError(f"tensor {name} has shape {seen}; config.json implies {want}")
