"""StableLM: LayerNorm with biases, rotation of part of a head, optionally parallel sub-layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.models import decoder
from fairy_compile.models.config import DecoderConfig, parse_decoder
from fairy_compile.models.elementwise import LayerNorm, layer_norm, split
from fairy_compile.models.kv_cache import attend
from fairy_compile.models.linear import LinearPlanner

MODEL_TYPE = "stablelm"
_DEFAULTS = {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class StableLmConfig(DecoderConfig):
    """Sizes and switches of a StableLM.

    Attributes:
        head_norms: every head of queries and keys has a norm of its own, without bias.
        parallel: attention and feed-forward take the same input.
    """

    head_norms: bool = False
    parallel: bool = False


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a StableLM config.json."""
    config = _DEFAULTS | dict(config)
    parsed = parse_decoder(
        config | {"rms_norm_eps": config["layer_norm_eps"]},
        qkv_bias=bool(config.get("use_qkv_bias", False)),
    )
    return StableLmConfig(
        **vars(parsed),
        head_norms=bool(config.get("qk_layernorm", False)),
        parallel=bool(config.get("use_parallel_residual", False)),
    )


class HeadNorm(nn.Module):
    """The weight (head_dim,) of one head's norm."""

    def __init__(self, size: int) -> None:
        self.weight = nn.Parameter((size,), "float32")


class HeadNorms(nn.Module):
    """LayerNorm of every head with a weight of its own."""

    def __init__(self, heads: int, size: int, eps: float, target: Any) -> None:
        self.norms = nn.ModuleList([HeadNorm(size) for _ in range(heads)])
        self.eps, self.target = eps, target

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (batch, tokens, heads, head_dim)."""
        weights = op.concat([norm.weight for norm in self.norms], dim=0)
        size = int(x.shape[-1])

        def scale(a: te.Tensor, weight: te.Tensor) -> te.Tensor:
            def value(*at: Any) -> Any:
                scaled = a[at].astype("float32") * weight[at[-2] * size + at[-1]]
                return scaled.astype(a.dtype)

            return te.compute(a.shape, value, name="scale_heads")

        plain = layer_norm(x, [], self.eps, self.target)
        return op.tensor_expr_op(scale, "scale_heads", [plain, weights])


class Attention(decoder.Attention):
    """Attention, with norms on heads where the model has them."""

    def __init__(
        self, prefix: str, config: StableLmConfig, planner: LinearPlanner, target: Any
    ) -> None:
        super().__init__(prefix, config, planner, target)
        if config.head_norms:
            size, eps = config.head_dim, config.rms_norm_eps
            self.q_layernorm = HeadNorms(self.heads, size, eps, target)
            self.k_layernorm = HeadNorms(self.kv_heads, size, eps, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Attend from x (batch, tokens, hidden); rotary embedding happens in the cache."""
        if not self.config.head_norms:
            return super().forward(x, cache, layer)
        batch, tokens, _ = x.shape
        heads, kv_heads = self.heads, self.kv_heads
        shape = (batch, tokens, heads + 2 * kv_heads, self.config.head_dim)
        qkv = op.reshape(self.qkv_proj(x), shape)
        q, k, v = split(qkv, [heads, kv_heads, kv_heads], axis=2)
        qkv = op.concat([self.q_layernorm(q), self.k_layernorm(k), v], dim=2)
        y = attend(cache, layer, qkv, self.config, self.target)
        return self.o_proj(op.reshape(y, (batch, tokens, self.q_size)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, one after the other or side by side."""

    def __init__(
        self, prefix: str, config: StableLmConfig, planner: LinearPlanner, target: Any
    ) -> None:
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LayerNorm(size, eps, target)
        self.self_attn = Attention(f"{prefix}.self_attn", config, planner, target)
        if not config.parallel:
            self.post_attention_layernorm = LayerNorm(size, eps, target)
        self.mlp = decoder.MLP(f"{prefix}.mlp", config, planner, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Run one layer over x (batch, tokens, hidden)."""
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, cache, layer)
        if self.config.parallel:
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(decoder.Decoder):
    """The decoder with layers of this family."""

    layer_type = DecoderLayer
    norm_type = LayerNorm


class Network(decoder.CausalLM):
    """The language model."""

    decoder_type = Decoder
