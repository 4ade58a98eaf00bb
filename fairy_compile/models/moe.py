"""Mixtures of experts: a router sends every token to a few of many feed-forward layers.

Rows that chose the same expert are brought together, multiplied, and put back by weighted sums. One
token on a GPU is not sorted: its products take the experts from the router's answer, and so two
launches less. Nothing of what a router chose is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.errors import ModelFileError
from fairy_compile.kernels import dense_gpu, experts_cpu, experts_gpu
from fairy_compile.kernels.base import ExpertsKernel
from fairy_compile.models import decoder
from fairy_compile.models.config import DecoderConfig, ExpertNames
from fairy_compile.models.elementwise import gate_product
from fairy_compile.models.linear import (
    LinearCall,
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
    """y = x A_e^T for rows of experts e, with the weights of all experts of a layer."""

    def forward_sorted(self, x: Tensor, starts: Tensor) -> Tensor:
        """Apply each row's expert to x (rows, in).

        Args:
            x: rows in the order of their experts.
            starts: int32 (experts + 1,), see `experts_cpu.build_group`.
        """
        rows = x.shape[0]
        if self.target.is_gpu:
            return self._call_over(_grouped_on_gpu(self.call, self.target), "many", x, starts, rows)
        known = int(rows) if isinstance(rows, int | tirx.IntImm) else None
        batch = self._batch(rows) if known is None else "single"
        # Of known rows, the choices of one token, no two go to one expert.
        several = "many" if batch == "single" else batch
        single, many = (kernel_function(self.call, self.target, b) for b in ("single", several))
        function = experts_cpu.build_grouped(self.call.experts, known, single, many)
        return self._call_over(function, batch, x, starts, rows)

    def forward_chosen(self, x: Tensor, ids: Tensor) -> Tensor:
        """Apply the experts ``ids``, int32 (1, chosen), of one token to x; for GPUs.

        x is (1, in), which all of them take, or (chosen, in), one row each; y is (chosen, out).
        """
        chosen = int(ids.shape[1])
        function = _chosen_on_gpu(self.call, self.target, chosen, int(x.shape[0]))
        own = "single_shared" if int(x.shape[0]) < chosen else "single"
        return self._call_over(function, own, x, ids, chosen)

    def _call_over(
        self, function: tirx.PrimFunc, batch: str, x: Tensor, index: Tensor, rows: Any
    ) -> Tensor:
        return op.tensor_ir_op(
            function.with_attr("op_pattern", 8),
            f"{kernel_symbol(self.call, batch)}_of_{self.call.experts}",
            [x, index, *(getattr(self, array) for array in self.array_names)],
            Tensor.placeholder((rows, sum(self.call.out_features)), self.call.out_dtype),
        )


def _grouped_on_gpu(call: LinearCall, target: Any) -> tirx.PrimFunc:
    if isinstance(call.kernel, ExpertsKernel) and call.spec:
        knobs = call.knobs.get("many", {})
        return call.kernel.build_grouped(call.spec, call.experts, target, knobs)
    return dense_gpu.build_grouped(call)


def _chosen_on_gpu(call: LinearCall, target: Any, chosen: int, x_rows: int) -> tirx.PrimFunc:
    if isinstance(call.kernel, ExpertsKernel) and call.spec:
        knobs = call.knobs.get("single", {})
        return call.kernel.build_chosen(call.spec, call.experts, chosen, x_rows, target, knobs)
    return dense_gpu.build_chosen(call, chosen, x_rows)


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
            planner.linear(
                f"{prefix}.gate", [f"{prefix}.gate"], hidden, [config.experts], out_dtype="float32"
            ),
            target,
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
        if self.target.is_gpu and _is_one(tokens):  # launches cost more than what they would save
            outputs = self.down_proj.forward_chosen(
                self._gate_product(self.gate_up_proj.forward_chosen(flat, ids)), ids
            )
            y = op.tensor_expr_op(_combine_one, "combine_experts", [outputs, weights])
            return op.reshape(y, (*lead, hidden))
        starts, order, places = self._group(ids, tokens)
        rows = op.tensor_expr_op(
            lambda a, at: _take(a, at, chosen), "gather_by_expert", [flat, order]
        )
        gated = self._gate_product(self.gate_up_proj.forward_sorted(rows, starts))
        outputs = self.down_proj.forward_sorted(gated, starts)
        y = op.tensor_expr_op(_combine, "combine_experts", [outputs, places, weights])
        return op.reshape(y, (*lead, hidden))

    def _gate_product(self, gate_up: Tensor) -> Tensor:
        return gate_product(gate_up, self.config.activation, self.target)

    def _route(self, logits: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
        experts, chosen = self.config.experts, self.config.experts_per_token
        batch = "single" if _is_one(tokens) else "many"
        kernels = experts_gpu if self.target.is_gpu else experts_cpu
        function = kernels.build_route(experts, chosen, self.config.normalize_experts, batch)
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
        batch = "single" if _is_one(tokens) else "many"
        kernels = experts_gpu if self.target.is_gpu else experts_cpu
        function = kernels.build_group(experts, chosen, batch)
        shapes = ((experts + 1,), (tokens * chosen,), (tokens, chosen))
        starts, order, places = op.tensor_ir_op(
            function.with_attr("op_pattern", 8),
            f"group_{batch}",
            [ids],
            [Tensor.placeholder(shape, "int32") for shape in shapes],
        )
        return starts, order, places


def _is_one(tokens: Any) -> bool:
    return isinstance(tokens, int) and tokens == 1


def _take(x: te.Tensor, order: te.Tensor, chosen: int) -> te.Tensor:
    """Return the token of each (token, choice) pair: (n, h) and int32 (r,) -> (r, h)."""
    return te.compute(
        (order.shape[0], x.shape[1]),
        lambda i, j: x[tirx.truncdiv(order[i], chosen), j],
        name="gather_by_expert",
    )


def _combine(outputs: te.Tensor, places: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """Return the weighted sums of each token's experts, summed in float32.

    Outputs (r, h), places int32 (n, chosen) and weights float32 (n, chosen) give (n, h) in the
    dtype of ``outputs``.
    """
    return _weighted_sum(outputs, weights, lambda i, k: places[i, k])


def _combine_one(outputs: te.Tensor, weights: te.Tensor) -> te.Tensor:
    """Do as `_combine` for one token, whose outputs (chosen, h) are in the order of its choices."""
    return _weighted_sum(outputs, weights, lambda _, k: k)


def _weighted_sum(
    outputs: te.Tensor, weights: te.Tensor, row: Callable[[Any, int], Any]
) -> te.Tensor:
    chosen = int(weights.shape[1])

    def total(i: Any, j: Any) -> Any:
        value: Any = tirx.const(0, "float32")
        for k in range(chosen):
            value = value + weights[i, k] * tirx.Cast("float32", outputs[row(i, k), j])
        return tirx.Cast(outputs.dtype, value)

    return te.compute((weights.shape[0], outputs.shape[1]), total, name="combine_experts")


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
