"""iFairy (`model_type: complexnet`, arXiv 2508.05571): natively complex layers, y = w conj(x).

Activations hold [re, im] side by side, so that everything but the linear layers is the real model
of twice the width. What the paper defines in complex numbers becomes

    RMSNorm      over re² + im², with weights of their own for re and im
    attention    scores Re(q conj(k)): heads [re, im] of twice the head size; multiplying with
                 e^(i angle) is rotary embedding in the form that pairs the two halves of a head
    activation   (re², im²) of the gate, 0 where both are negative, conjugated, times up
    head         a real matrix on [re, im]

and a norm before the output projection and one before the down projection. Inputs of linear layers
are rounded to int8 a token (`op.token_int8`), embeddings and head are not.

Attention scores are scaled by (head_dim)^-1/2 of the complex head size, as in the paper. Training
code published with it leaves the scale to flash attention where that is used, which takes
(2 head_dim)^-1/2; the key ``attention_multiplier`` of config.json, which is ours, chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.models.config import DecoderConfig
from fairy_compile.models.decoder import CausalLM, gather_rows
from fairy_compile.models.elementwise import (
    regroup_heads,
    relu2_product,
    rms_norm,
    round_tokens,
)
from fairy_compile.models.kv_cache import attend
from fairy_compile.models.linear import LinearPlanner, PlannedLinear, make_linear
from fairy_compile.models.rope import Rope
from fairy_compile.models.values import positive_float, positive_int

MODEL_TYPE = "complexnet"
# Keys of config.json that the published model does not implement, whatever they are set to.
_UNUSED = {"rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read an iFairy config.json; sizes of the result count re and im.

    Raises:
        ModelFileError: a size is missing, not an integer, or inconsistent.
        UnsupportedError: the activation is another one, or a key has a value that the published
            model would ignore.
    """
    hidden = positive_int(config, "hidden_size")
    heads = positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    if hidden % heads or heads % kv_heads:
        raise ModelFileError(
            f"config.json has hidden_size {hidden}, {heads} attention heads and {kv_heads} "
            "key/value heads; each must be a multiple of the next"
        )
    activation = config.get("hidden_act", "relu2")
    if activation != "relu2":
        raise UnsupportedError(f"activation {activation!r} is not supported; supported: relu2")
    for key, default in _UNUSED.items():
        if config.get(key) not in (None, default):
            raise UnsupportedError(
                f"config.json has {key} = {config[key]!r}; supported for {MODEL_TYPE}: {default!r}"
            )
    scale = positive_float(config, "attention_multiplier", (hidden // heads) ** -0.5)
    return DecoderConfig(
        model_type=MODEL_TYPE,
        hidden_size=2 * hidden,
        intermediate_size=2 * positive_int(config, "intermediate_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=2 * (hidden // heads),
        vocab_size=positive_int(config, "vocab_size"),
        rms_norm_eps=positive_float(config, "rms_norm_eps", 1e-5),
        rope=Rope(positive_float(_rope(config), "rope_theta", 10000.0)),
        context=positive_int(config, "max_position_embeddings", 2048),
        context_reason="of the model",
        tie_word_embeddings=False,
        attention_scale=scale,
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return where ``rope_theta`` stands: newer versions of transformers move it."""
    parameters = config.get("rope_parameters")
    return parameters if isinstance(parameters, Mapping) else config


class RoundingLinear(PlannedLinear):
    """A linear layer that rounds its inputs to int8 a token, if the plan says so."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., 2m)."""
        if self.call.token_int8:
            x = round_tokens(x, self.target, guarded=self.call.guarded)
        return super().forward(x)


class ComplexRMSNorm(nn.Module):
    """x / sqrt(mean(re² + im²) + eps), re and im times weights of their own.

    The mean is twice that of the 2n real numbers, so it is their RMSNorm with half the eps, times
    2^-1/2.
    """

    def __init__(self, size: int, eps: float, target: Any) -> None:
        self.weight_real = nn.Parameter((size // 2,), "float32")
        self.weight_imag = nn.Parameter((size // 2,), "float32")
        self.eps, self.target = eps, target

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float32 x (..., size)."""

        def join(re: te.Tensor, im: te.Tensor) -> te.Tensor:
            n, factor = re.shape[0], tirx.const(0.5**0.5, "float32")
            return te.compute(
                (2 * n,),
                lambda i: factor * tirx.if_then_else(i < n, re[te.min(i, n - 1)], im[i - n]),
                name="norm_weight",
            )

        weight = op.tensor_expr_op(join, "join_norm_weight", [self.weight_real, self.weight_imag])
        return rms_norm(x, weight, self.eps / 2, self.target)


class Attention(nn.Module):
    """Attention over heads [re, im] in the paged KV cache, with one fused QKV call."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        self.config, self.target = config, target
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv_proj = make_linear(
            planner.linear(
                f"{prefix}.qkv_proj",
                [f"{prefix}.{part}_proj" for part in "qkv"],
                config.hidden_size,
                [heads * size, kv_heads * size, kv_heads * size],
                token_int8=True,
            ),
            target,
            layer=RoundingLinear,
        )
        self.attn_layernorm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps, target)
        self.o_proj = make_linear(
            planner.linear(
                f"{prefix}.o_proj",
                [f"{prefix}.o_proj"],
                config.hidden_size,
                [config.hidden_size],
                token_int8=True,
            ),
            target,
            layer=RoundingLinear,
        )

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Attend from x (batch, tokens, hidden); rotary embedding happens in the cache."""
        batch, tokens, _ = x.shape
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        size = self.config.head_dim // 2
        parts = [heads, kv_heads, kv_heads]
        qkv = regroup_heads(self.qkv_proj(x), parts, size, self.target, to_heads=True)
        qkv = op.reshape(qkv, (batch, tokens, sum(parts), 2 * size))
        y = attend(cache, layer, qkv, self.config, self.target)
        y = op.reshape(y, (batch, tokens, 2 * heads * size))
        y = regroup_heads(y, [heads], size, self.target, to_heads=False)
        return self.o_proj(self.attn_layernorm(y))


class MLP(nn.Module):
    """down(norm(conj(relu²(gate)) up)), with one fused gate/up call."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        inner, hidden = config.intermediate_size, config.hidden_size
        self.target = target
        self.gate_up_proj = make_linear(
            planner.linear(
                f"{prefix}.gate_up_proj",
                [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
                hidden,
                [inner, inner],
                token_int8=True,
            ),
            target,
            layer=RoundingLinear,
        )
        self.ffn_layernorm = ComplexRMSNorm(inner, config.rms_norm_eps, target)
        self.down_proj = make_linear(
            planner.linear(
                f"{prefix}.down_proj", [f"{prefix}.down_proj"], inner, [hidden], token_int8=True
            ),
            target,
            layer=RoundingLinear,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward layer."""
        gated = relu2_product(self.gate_up_proj(x), self.target)
        return self.down_proj(self.ffn_layernorm(gated))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        self.pre_layernorm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps, target)
        self.self_attn = Attention(f"{prefix}.self_attn", config, planner, target)
        self.post_layernorm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps, target)
        self.mlp = MLP(f"{prefix}.mlp", config, planner, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Run one layer over x (batch, tokens, hidden)."""
        x = x + self.self_attn(self.pre_layernorm(x), cache, layer)
        return x + self.mlp(self.post_layernorm(x))


class Embedding(nn.Module):
    """One half, real or imaginary, of the token embedding (vocab, hidden)."""

    def __init__(self, vocab: int, hidden: int, dtype: str) -> None:
        self.weight = nn.Parameter((vocab, hidden), dtype)


class Network(CausalLM):
    """The language model; parameter names follow the published checkpoint."""

    def __init__(self, config: DecoderConfig, planner: LinearPlanner, target: Any) -> None:
        if config.act_dtype != "float32":
            raise UnsupportedError(
                f"{MODEL_TYPE} computes with float32 activations; target {target.name} would use "
                f"{config.act_dtype}. Build with --act float, without --act-dtype"
            )
        self.config, self.target = config, target

        def embedding(name: str) -> Embedding:
            dtype = planner.dtype(f"{name}.weight")
            return Embedding(config.vocab_size, config.hidden_size // 2, dtype)

        self.token_embeddings_real = embedding("token_embeddings_real")
        self.token_embeddings_imag = embedding("token_embeddings_imag")
        self.layer = nn.ModuleList(
            [DecoderLayer(f"layer.{i}", config, planner, target) for i in range(config.num_layers)]
        )
        self.final_norm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps, target)
        self.lm_head = make_linear(
            planner.head("lm_head", config.hidden_size, config.vocab_size), target
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids int32 (n,) -> float32 (n, hidden)."""
        tables = (self.token_embeddings_real, self.token_embeddings_imag)
        halves = [gather_rows(t.weight, ids, "embed_tokens", "float32") for t in tables]
        return op.concat(halves, dim=-1)

    def model(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Run all layers over embedded tokens x (batch, tokens, hidden)."""
        for i, layer in enumerate(self.layer):
            x = layer(x, cache, i)
        return self.final_norm(x)
