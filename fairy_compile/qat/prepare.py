"""`prepare`: the linear layers of a model become phase layers, in place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.frontends.method import LATENT_QUANT_METHOD
from fairy_compile.frontends.plan import (
    LayerPlan,
    exempting_pattern,
    plan_weight,
    recover_layer,
    unmatched_notes,
)
from fairy_compile.phase import as_float32
from fairy_compile.qat.experts import convert_experts, phase_experts, plan_experts
from fairy_compile.qat.layers import (
    ComplexLinear,
    PhaseComplexLinear,
    PhaseLinear,
    phase_layers,
    replace_module,
)

# Where `prepare` leaves the configuration for `export`.
QUANT_ATTRIBUTE = "fairy_quant"
TRAINED = "trained through the phase rule"
_TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PreparedLayer:
    """What `prepare` did with one linear layer.

    Attributes:
        name: layer, without ``.weight``; ``*`` stands for all experts of a layer.
        shape: (out_features, in_features) of the real map, of one expert.
        phase: True if it computes with phase codes now, False if it stays dense.
        stages: T, 0 for a dense layer.
        reason: why, in words.
    """

    name: str
    shape: tuple[int, int]
    phase: bool
    stages: int
    reason: str


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did with a model.

    Attributes:
        quant: the quantisation trained for; its method is ``"phase"``.
        layers: one entry a linear layer.
        notes: sentences on what else changed, such as an output head untied from the embedding.
    """

    quant: QuantConfig
    layers: list[PreparedLayer]
    notes: list[str]

    @property
    def phase(self) -> list[PreparedLayer]:
        """The layers that compute with phase codes."""
        return [layer for layer in self.layers if layer.phase]

    @property
    def dense(self) -> list[PreparedLayer]:
        """The linear layers that stay dense."""
        return [layer for layer in self.layers if not layer.phase]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "quant": self.quant.to_json(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "notes": list(self.notes),
        }


def prepare(model: nn.Module, quant: QuantConfig | str = "w2") -> PrepareReport:
    """Make the linear layers of a model compute with phase codes, in place.

    Every `torch.nn.Linear` becomes a `PhaseLinear`, every `ComplexLinear` a `PhaseComplexLinear`,
    with the same parameters under the same names. Which layers stay dense is decided as `convert`
    decides it: the exempt patterns, odd sizes, embeddings. An output head that is tied to the
    embedding gets a weight of its own, since the embedding stays dense; exempt ``lm_head`` to keep
    it tied. Complex layers round their inputs to int8 if ``quant.act`` is ``"int8"``, as iFairy
    does; real layers train with exact activations. Experts of Mixtral and Qwen3-MoE keep their
    parameters of three dimensions and are quantised matrix by matrix; routers stay dense.

    Call it before the model is compiled, wrapped for distributed training or given to an optimiser.

    Args:
        model: any module; transformers causal language models can be exported.
        quant: ``"w1"`` .. ``"w4"`` or a whole `QuantConfig`; its method must be ``"auto"`` or
            ``"phase"``, the rule that training goes through.

    Raises:
        FairyError: the model has no layer to convert, was prepared before, is a mixture of experts
            of another family, or the method is another one.
    """
    if not isinstance(model, nn.Module):
        raise FairyError(
            f"the model is {model!r:.80}; allowed: a torch.nn.Module, such as "
            "AutoModelForCausalLM.from_pretrained(DIR) returns"
        )
    if isinstance(model, nn.Linear | ComplexLinear):
        raise FairyError(
            f"the model is a single {type(model).__name__}, which cannot be replaced in place; put "
            "it into a module, such as torch.nn.Sequential"
        )
    quant = quant if isinstance(quant, QuantConfig) else QuantConfig(quant)
    if quant.method not in ("auto", "phase"):
        raise FairyError(
            f"training goes through the published rule, method 'phase'; got {quant.method!r}, "
            "which is for models that are not trained"
        )
    quant = dataclasses.replace(quant, method="phase")
    if phase_layers(model) or phase_experts(model):
        raise FairyError("the model has phase layers already; prepare it once, before training")
    experts = plan_experts(model, quant)
    plans, shapes, notes = _plan(model, quant)
    projections = [part for parts in experts.values() for part in parts]
    notes += unmatched_notes(quant, [*plans, *(part.name.format(0) for part in projections)])
    if not any(plan.phase for plan in (*plans.values(), *(part.plan for part in projections))):
        kept = "; ".join(f"{name}: {plan.reason}" for name, plan in list(plans.items())[:5])
        raise FairyError(
            f"{type(model).__name__} has no linear layer to convert"
            + (f" ({kept})" if kept else "")
            + "; give a model with linear layers of even sizes, or fewer exempt patterns"
        )
    for name, plan in plans.items():
        if plan.phase:
            notes += _untie(model, name)
            _replace(model, name, plan, quant)
    for name, parts in experts.items():
        if any(part.plan.phase for part in parts):
            convert_experts(model.get_submodule(name), parts, quant.scale)
    _keep_from_fast_paths(model)
    setattr(model, QUANT_ATTRIBUTE, quant)
    # An export that is trained further carries a mark that `export` writes anew; with it,
    # transformers would take the model for one that cannot be trained.
    config = getattr(model, "config", None)
    mark = getattr(config, "quantization_config", None)
    if isinstance(mark, dict) and mark.get("quant_method") == LATENT_QUANT_METHOD:
        del config.quantization_config
    layers = [
        PreparedLayer(name, shapes[name], plan.phase, plan.stages, plan.reason)
        for name, plan in plans.items()
    ]
    for part in projections:
        plan, name = part.plan, part.name.format("*")
        reason = TRAINED if plan.phase else plan.reason
        layers.append(PreparedLayer(name, part.shape, plan.phase, plan.stages, reason))
    return PrepareReport(quant, layers, notes)


def _plan(
    model: nn.Module, quant: QuantConfig
) -> tuple[dict[str, LayerPlan], dict[str, tuple[int, int]], list[str]]:
    """Decide what becomes of every linear layer; changes nothing."""
    plans: dict[str, LayerPlan] = {}
    shapes: dict[str, tuple[int, int]] = {}
    notes: list[str] = []
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, ComplexLinear):
            sizes = (module.out_features, module.in_features)
            shapes[name] = (2 * sizes[0], 2 * sizes[1])
            plans[name] = _plan_complex(name, quant)
            continue
        if not isinstance(module, nn.Linear):
            continue
        shapes[name] = (module.out_features, module.in_features)
        if type(module) is not nn.Linear:
            plans[name] = LayerPlan.dense(f"a {type(module).__name__}, not a plain Linear")
            continue
        # A QuantConfig for complex layers says nothing about the real ones of the same model.
        real = dataclasses.replace(quant, terms=("U", "W"))
        plan = plan_weight(name, shapes[name], real)
        if quant.terms != ("U", "W") and plan.phase:
            plan = LayerPlan.dense(f"a real matrix, which has no form with terms {quant.terms}")
        if plan.phase and module.weight.dtype not in _TORCH_DTYPES:
            plan = LayerPlan.dense(f"dtype {module.weight.dtype}")
        if plan.phase:
            first = seen.setdefault(id(module.weight), name)
            if first != name:
                plan = LayerPlan.dense(f"shares its weight with {first}")
                plans[first] = LayerPlan.dense(f"shares its weight with {name}")
        if plan.phase:
            if _is_baked(module.weight, name, real):
                notes.append(
                    f"{name} holds phase values already; the rule moves such weights, so train "
                    "from the master weights they were made of if there are any"
                )
            plan = dataclasses.replace(plan, reason=TRAINED)
        plans[name] = plan
    return plans, shapes, notes


def _plan_complex(name: str, quant: QuantConfig) -> LayerPlan:
    if (pattern := exempting_pattern(name, quant)) is not None:
        return LayerPlan.dense(f"exempt by pattern {pattern!r}")
    if quant.terms != ("W",):
        return LayerPlan.dense("natively complex; QuantConfig(terms=('W',)) converts it")
    return LayerPlan(True, quant.stages(name), ("W",), quant.scale, TRAINED)


def _is_baked(weight: torch.Tensor, name: str, quant: QuantConfig) -> bool:
    if weight.device.type == "meta":
        return False
    return recover_layer(as_float32(weight), name, quant) is not None


def _untie(model: nn.Module, name: str) -> list[str]:
    """Give a linear layer that shares its weight with an embedding one of its own."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        return []
    others = [
        other
        for other, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is layer.weight
    ]
    if not others:
        return []
    layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
        if hasattr(config, "get_text_config"):  # models whose text part has a config of its own
            config.get_text_config().tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if isinstance(tied, dict):
        tied.pop(f"{name}.weight", None)
    return [
        f"{name} was tied to {others[0]} and now has a weight of its own; the embedding stays "
        f"dense (exempt {name} to keep it tied)"
    ]


def _replace(model: nn.Module, name: str, plan: LayerPlan, quant: QuantConfig) -> None:
    layer = model.get_submodule(name)
    make = PhaseLinear.of if isinstance(layer, nn.Linear) else PhaseComplexLinear.of
    options = {}
    if isinstance(layer, ComplexLinear):
        options["int8_inputs"] = quant.act == "int8"
    replace_module(model, layer, make(layer, plan.stages, quant.scale, **options))


def _keep_from_fast_paths(model: nn.Module) -> None:
    """Have PyTorch's encoder layers call their linear layers, also where nothing is trained.

    In evaluation they hand all weights to one fused function, which would take the latents.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and phase_layers(module):
            module.activation_relu_or_gelu = 0  # the function knows these two; forward asks others
        elif isinstance(module, nn.TransformerEncoder) and phase_layers(module):
            module.use_nested_tensor = False
