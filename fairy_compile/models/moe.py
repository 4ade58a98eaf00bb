"""Mixtures of experts: a router sends every token to a few of many feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.errors import ModelFileError
from fairy_compile.kernels import experts_cpu
from fairy_compile.models import decoder
from fairy_compile.models.config import DecoderConfig, ExpertNames
from fairy_compile.models.elementwise import gate_product
from fairy_compile.models.linear import (
    LinearPlanner,
    PlannedLinear,
    kernel_function,
    kernel_symbol,
    make_linear,
)
from fairy_compile.models.shapes import product
from fairy_compile.models.values import positive_int


def mixture_sizes(config: Mapping[str, Any], *count_keys: str) -> dict[str, Any]:
    """Return the fields of `DecoderConfig` that say how many experts there are.

    Args:
        config: config.json.
        count_keys: where it has the number of experts; the first that is there counts.

    Raises:
        ModelFileError: a token is to go to more experts than there are.
    """
    key = next((key for key in count_keys if config.get(key) is not None), count_keys[0])
    experts, chosen = positive_int(config, key), positive_int(config, "num_experts_per_tok")
    if chosen > experts:
        raise ModelFileError(
            f"config.json sends a token to {chosen} experts (num_experts_per_tok) of {experts}"
        )
    return {"experts": experts, "experts_per_token": chosen}


def _names(config: DecoderConfig) -> ExpertNames:
    if config.expert_names is None:
        raise ValueError(f"family {config.model_type} has experts without names")
    return config.expert_names


class PlannedExperts(PlannedLinear):
    """y = x A_e^T for rows sorted by expert e, with the weights of all experts of a layer."""

    def forward_sorted(self, x: Tensor, starts: Tensor) -> Tensor:
        """Apply each row's expert to x (rows, in).

        Args:
            x: rows in the order of their experts.
            starts: int32 (experts + 1,), see `experts_cpu.build_group`.
        """
        rows = x.shape[0]
        known = int(rows) if isinstance(rows, int | tirx.IntImm) else None
        batch = self._batch(rows) if known is None else "single"
        # Of known rows, the choices of one token, no two go to one expert.
        several = "many" if batch == "single" else batch
        single, many = (kernel_function(self.call, self.target, b) for b in ("single", several))
        function = experts_cpu.build_grouped(self.call.experts, known, single, many)
        name = kernel_symbol(self.call, batch)
        return op.tensor_ir_op(
            function.with_attr("op_pattern", 8),
            f"{name}_of_{self.call.experts}",
            [x, starts, *(getattr(self, array) for array in self.array_names)],
            Tensor.placeholder((rows, sum(self.call.out_features)), self.call.out_dtype),
        )


class SparseMLP(nn.Module):
    """sum_e w_e down_e(activation(gate_e(x)) * up_e(x)) over the experts a router chooses.

    The router stays dense: it is small, and every later product hangs on its choice. Names of
    parameters follow the checkpoint, but for ``experts``, whose weights are together.
    """

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        self.config, self.target = config, target
        hidden, inner, names = config.hidden_size, config.expert_size, _names(config)
        own = [f"{prefix}.experts.{e}" for e in range(config.experts)]
        self.gate = make_linear(
            planner.linear(f"{prefix}.gate", [f"{prefix}.gate"], hidden, [config.experts]), target
        )
        self.gate_up_proj = PlannedExperts(
            planner.experts(
                f"{prefix}.experts.gate_up_proj",
                [[f"{expert}.{part}" for part in (names.gate, names.up)] for expert in own],
                hidden,
                [inner, inner],
            ),
            target,
        )
        self.down_proj = PlannedExperts(
            planner.experts(
                f"{prefix}.experts.down_proj",
                [[f"{expert}.{names.down}"] for expert in own],
                inner,
                [hidden],
            ),
            target,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the mixture to x (batch, tokens, hidden)."""
        *lead, hidden = x.shape
        tokens, chosen = product(lead), self.config.experts_per_token
        flat = op.reshape(x, (tokens, hidden))
        weights, ids = self._route(self.gate(flat), tokens)
        starts, order, places = self._group(ids, tokens)
        rows = op.tensor_expr_op(
            lambda a, at: _take(a, at, chosen), "gather_by_expert", [flat, order]
        )
        gated = gate_product(
            self.gate_up_proj.forward_sorted(rows, starts),
            self.config.activation,
            self.target,
        )
        outputs = self.down_proj.forward_sorted(gated, starts)
        y = op.tensor_expr_op(_combine, "combine_experts", [outputs, places, weights])
        return op.reshape(y, (*lead, hidden))

    def _route(self, logits: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
        experts, chosen = self.config.experts, self.config.experts_per_token
        batch = "single" if isinstance(tokens, int) and tokens == 1 else "many"
        function = experts_cpu.build_route(experts, chosen, self.config.normalize_experts, batch)
        shape = (tokens, chosen)
        weights, ids = op.tensor_ir_op(
            function.with_attr("op_pattern", 8),
            f"route_{batch}",
            [logits],
            [Tensor.placeholder(shape, "float32"), Tensor.placeholder(shape, "int32")],
        )
        return weights, ids

    def _group(self, ids: Tensor, tokens: Any) -> tuple[Tensor, Tensor, Tensor]:
        experts, chosen = self.config.experts, self.config.experts_per_token
        batch = "single" if isinstance(tokens, int) and tokens == 1 else "many"
        function = experts_cpu.build_group(experts, chosen, batch)
        shapes = ((experts + 1,), (tokens * chosen,), (tokens, chosen))
        starts, order, places = op.tensor_ir_op(
            function.with_attr("op_pattern", 8),
            f"group_{batch}",
            [ids],
            [Tensor.placeholder(shape, "int32") for shape in shapes],
        )
        return starts, order, places


def _take(x: te.Tensor, order: te.Tensor, chosen: int) -> te.Tensor:
    """Return the token of each (token, choice) pair: (n, h) and int32 (r,) -> (r, h)."""
    return te.compute(
        (order.shape[0], x.shape[1]),
        lambda i, j: x[tirx.truncdiv(order[i], chosen), j],
        name="gather_by_expert",
    )


def _combine(outputs: te.Tensor, places: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """Return the weighted sum of a token's experts: (n, h) in the dtype of ``outputs``."""
    chosen = int(places.shape[1])

    def total(i: Any, j: Any) -> Any:
        value: Any = tirx.const(0, "float32")
        for k in range(chosen):
            value = value + weights[i, k] * outputs[places[i, k], j]
        return value

    return te.compute((places.shape[0], outputs.shape[1]), total, name="combine_experts")


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, dense or a mixture, with residual connections."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = decoder.RMSNorm(size, eps, target)
        self.self_attn = decoder.Attention(f"{prefix}.self_attn", config, planner, target)
        self.post_attention_layernorm = decoder.RMSNorm(size, eps, target)
        layer = int(prefix.rpartition(".")[2])
        sparse = config.is_sparse(layer)
        block = _names(config).block if sparse else "mlp"
        self.block_name = block
        kind = SparseMLP if sparse else decoder.MLP
        setattr(self, block, kind(f"{prefix}.{block}", config, planner, target))

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Run one layer over x (batch, tokens, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), cache, layer)
        return x + getattr(self, self.block_name)(self.post_attention_layernorm(x))


class Decoder(decoder.Decoder):
    """The decoder with layers that may be mixtures."""

    layer_type = DecoderLayer


class Network(decoder.CausalLM):
    """The language model of a family with mixtures of experts."""

    decoder_type = Decoder
