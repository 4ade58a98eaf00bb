"""Which kernel computes which layer, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from fairy_compile.compiler.schedules import Schedules
from fairy_compile.config import QuantConfig, check_choice
from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.source import LayerPlan, ModelSource
from fairy_compile.kernels import FAMILIES
from fairy_compile.kernels.base import Batch, ExpertsKernel, PhaseKernel
from fairy_compile.models.linear import LinearCall
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.op.token_int8 import guarded_columns
from fairy_compile.targets import Target, activation_dtype

Refusals = dict[str, dict[str, str]]
"""Reason -> family -> what is named of it: one of its kernels, or the family."""


def pick_kernel(
    spec: PhaseSpec, target: Target, experts: int = 0
) -> tuple[PhaseKernel, PhaseSpec, str]:
    """Return the first of the target's kernels that serves ``spec``, and the reason in words.

    A kernel family that only computes with float activations may serve an ``int8`` request: that
    is more accurate than what was asked for, and the reason says so. With ``experts`` the call is
    of so many matrices, which on GPUs an `ExpertsKernel` serves.

    Raises:
        UnsupportedError: no kernel of the target can serve the call.
    """
    refusals: Refusals = {}
    for contract in dict.fromkeys((spec.act, "float")):
        wanted = replace(spec, act=contract)
        for family in target.kernels:
            check_choice(f"kernel family of target {target.name}", family, list(FAMILIES))
            for kernel in FAMILIES[family]:
                refusal = kernel.unsupported(wanted, target)
                if experts and target.is_gpu:
                    refusal = _lacks_experts(kernel, wanted, experts) or refusal
                if refusal is None:
                    return kernel, wanted, _in_words(refusals) or "first choice of the target"
                # Members of a family that refuse for one reason are named by the family.
                names = refusals.setdefault(refusal, {})
                names[family] = family if family in names else kernel.name
    raise UnsupportedError(
        f"target {target.name} has no kernel for {spec.describe()}: {_in_words(refusals)}; "
        "try --act float or another --target"
    )


def _lacks_experts(kernel: PhaseKernel, spec: PhaseSpec, experts: int) -> str | None:
    if not isinstance(kernel, ExpertsKernel):
        return "it multiplies by one matrix, not by those of several experts"
    return kernel.unsupported_experts(spec, experts)


# Kernel knobs that keep the weights exact. An approximate ratio of scales would undo what exact
# activations are for.
_EXACT = {"tables": "split", "panels": "split"}


def pick_token_int8_kernel(spec: PhaseSpec, target: Target) -> tuple[PhaseKernel, PhaseSpec, str]:
    """Return kernel, spec and reason of a call with inputs rounded by `op.token_int8`.

    A kernel with int8 activations serves it with guarded columns, any other as a call with float
    activations; both are exact.
    """
    if spec.scale == "tile64":
        kernel, spec, reason = pick_kernel(replace(spec, act="float"), target)
        return kernel, spec, f"{reason}; {_ROUNDED}, since guards would move the columns of tiles"
    kernel, picked, reason = pick_kernel(replace(spec, m=guarded_columns(spec.m)), target)
    if picked.act == "int8":
        return kernel, picked, f"{reason}; {_GUARDED}"
    kernel, picked, reason = pick_kernel(spec, target)
    return kernel, picked, f"{reason}; {_ROUNDED}"


_GUARDED = "int8 activations a token, exactly, by two guard columns in each group of 128"
_ROUNDED = "inputs are rounded to int8 a token before a call with float activations"


def _in_words(refusals: Refusals) -> str:
    return "; ".join(f"not {', '.join(names.values())}: {why}" for why, names in refusals.items())


class Planner:
    """Answers a model's questions about its linear layers from a source's headers alone.

    Args:
        source: the weights.
        quant: how they become codes.
        target: what is compiled for.
        demands: call name -> knobs its weights turned out to need, see `PhaseKernel.demands`.
        act_dtype: of activations between kernels; default the target's.
    """

    def __init__(
        self,
        source: ModelSource,
        quant: QuantConfig,
        target: Target,
        demands: Mapping[str, Mapping[str, Any]] | None = None,
        act_dtype: str | None = None,
    ) -> None:
        self.source = source
        self.quant = quant
        self.target = target
        self.demands = demands or {}
        self.calls: list[LinearCall] = []
        self.layer_plans: dict[str, LayerPlan] = {}
        self._names = frozenset(source.names())
        self.act_dtype = activation_dtype(target, quant.act, act_dtype)
        self.schedules = Schedules(target)

    def dtype(self, name: str) -> str:
        """See `LinearPlanner.dtype`. GPUs store real weights as they compute with them."""
        return self.act_dtype if self.target.is_gpu else self.source.dtype(name)

    def source_dtype(self, name: str) -> str:
        """See `LinearPlanner.source_dtype`."""
        return self.source.dtype(name)

    def linear(
        self,
        name: str,
        sources: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        bias: bool = False,
        token_int8: bool = False,
        out_dtype: str | None = None,
    ) -> list[LinearCall]:
        """See `LinearPlanner.linear`: neighbours that agree on everything share a call."""
        for layer, rows in zip(sources, out_features, strict=True):
            self._check_shape(f"{layer}.weight", (rows, in_features))
            if bias:
                self._check_shape(f"{layer}.bias", (rows,))
            self.layer_plans[layer] = self.source.plan(layer, self.quant)
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
            call = self._call(own_name, layers, in_features, rows, bias, token_int8, out_dtype)
            calls.append(call)
        if len(groups) > 1:
            note = "; not fused with its neighbours: they differ in form"
            calls = [replace(c, reason=c.reason + note) for c in calls]
        self.calls.extend(calls)
        return calls

    def experts(
        self,
        name: str,
        sources: Sequence[Sequence[str]],
        in_features: int,
        out_features: Sequence[int],
    ) -> LinearCall:
        """See `LinearPlanner.experts`.

        Raises:
            UnsupportedError: the target has no such kernels, or experts differ in form.
        """
        families = (kernel for family in self.target.kernels for kernel in FAMILIES.get(family, ()))
        if self.target.is_gpu and not any(isinstance(k, ExpertsKernel) for k in families):
            raise UnsupportedError(
                f"{name} is a mixture of {len(sources)} experts; target {self.target.name} has no "
                "kernels for mixtures of experts, CPU targets have; build with --target cpu"
            )
        for layers in sources:
            for layer, rows in zip(layers, out_features, strict=True):
                self._check_shape(f"{layer}.weight", (rows, in_features))
                self.layer_plans[layer] = self.source.plan(layer, self.quant)
                if not self._fusable(sources[0][0], layer):
                    raise UnsupportedError(
                        f"{layer} differs in stages, scales or dtype from {sources[0][0]}; all "
                        "experts of a layer must agree, so use patterns such as '*.experts.*'"
                    )
        rows = tuple(out_features)
        count = len(sources)
        call = self._call(name, tuple(sources[0]), in_features, rows, False, False, None, count)
        flat = tuple(layer for layers in sources for layer in layers)
        call = replace(call, sources=flat, experts=count)
        self.calls.append(call)
        return call

    def head(self, name: str, in_features: int, vocab: int) -> list[LinearCall]:
        """See `LinearPlanner.head`.

        A head is quantised like any other layer, also one tied to the embedding, which then stays
        as it is. A tied head that stays dense reads the embedding itself.
        """
        weight = f"{name}.weight"
        if weight not in self._names:
            raise ModelFileError(
                f"the checkpoint has no tensor {weight} and its config.json does not set "
                "tie_word_embeddings"
            )
        plan = self.source.plan(name, self.quant)
        if plan.phase or weight not in self.source.tied:
            return self.linear(name, [name], in_features, [vocab], out_dtype="float32")
        self._check_shape(weight, (vocab, in_features))
        call = LinearCall(
            name=name,
            sources=(name,),
            in_features=in_features,
            out_features=(vocab,),
            bias=False,
            reason=f"{plan.reason}; reads the tied embedding",
            dtype=self.dtype(weight),
            shared=self.source.tied[weight],
            act_dtype=self.act_dtype,
        )
        self.calls.append(call)
        return [call]

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
        token_int8: bool,
        out_dtype: str | None,
        experts: int = 0,
    ) -> LinearCall:
        plan = self.layer_plans[layers[0]]
        out_dtype = out_dtype or self.act_dtype
        common: dict[str, Any] = {
            "name": name,
            "sources": layers,
            "in_features": in_features,
            "out_features": rows,
            "bias": bias,
            "act_dtype": self.act_dtype,
            "out_dtype": out_dtype,
        }
        if not plan.phase:
            dtype = self.dtype(f"{layers[0]}.weight")
            return LinearCall(**common, reason=plan.reason, dtype=dtype)
        spec = PhaseSpec(
            parts=tuple(n // 2 for n in rows),
            m=in_features // 2,
            stages=plan.stages,
            terms=plan.terms,
            scale=plan.scale,
            act=self.quant.act,
            dtype=self.act_dtype,
            out_dtype=out_dtype,
        )
        token_int8 = token_int8 and spec.act == "int8"
        if token_int8:
            kernel, spec, reason = pick_token_int8_kernel(spec, self.target)
        else:
            kernel, spec, reason = pick_kernel(spec, self.target, experts)
        demanded = dict(self.demands.get(name, {}))
        if token_int8:
            demanded = {k: v for k, v in _EXACT.items() if v in kernel.knobs.get(k, ())}
        choices = {
            batch: self.schedules.choose(kernel, spec, batch, demanded) for batch in get_args(Batch)
        }
        if demanded and not token_int8:
            settings = ", ".join(f"{knob}={value}" for knob, value in demanded.items())
            reason += f"; its weights need {settings}"
        return LinearCall(
            **common,
            reason=reason,
            spec=spec,
            kernel=kernel,
            knobs={batch: choice.values for batch, choice in choices.items()},
            demands=demanded,
            tuned={batch: choice.origin for batch, choice in choices.items()},
            token_int8=token_int8,
        )

    def _check_shape(self, name: str, want: tuple[int, ...]) -> None:
        if name not in self._names:
            raise ModelFileError(f"the checkpoint has no tensor {name}, which config.json implies")
        seen = tuple(self.source.shape(name))
        if seen != want:
            raise ModelFileError(f"tensor {name} has shape {seen}; config.json implies {want}")
