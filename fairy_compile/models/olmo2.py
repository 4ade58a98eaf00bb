"""OLMo 2: Llama with norms after attention and feed-forward, and over all of Q and all of K."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.models import decoder
from fairy_compile.models.config import DecoderConfig, parse_decoder
from fairy_compile.models.elementwise import RMSNorm, split
from fairy_compile.models.kv_cache import attend
from fairy_compile.models.linear import LinearPlanner

MODEL_TYPE = "olmo2"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read an OLMo 2 config.json."""
    biased = bool(config.get("attention_bias", False))
    return parse_decoder({"rms_norm_eps": 1e-5} | dict(config), qkv_bias=biased, o_bias=biased)


class Attention(decoder.Attention):
    """Attention with one norm over the queries of all heads, and one over the keys."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        super().__init__(prefix, config, planner, target)
        self.q_norm = RMSNorm(self.q_size, config.rms_norm_eps, target)
        self.k_norm = RMSNorm(self.kv_size, config.rms_norm_eps, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Attend from x (batch, tokens, hidden); rotary embedding happens in the cache."""
        batch, tokens, _ = x.shape
        heads = self.heads + 2 * self.kv_heads
        q, k, v = split(self.qkv_proj(x), [self.q_size, self.kv_size, self.kv_size], axis=-1)
        qkv = op.concat([self.q_norm(q), self.k_norm(k), v], dim=-1)
        qkv = op.reshape(qkv, (batch, tokens, heads, self.config.head_dim))
        y = attend(cache, layer, qkv, self.config, self.target)
        return self.o_proj(op.reshape(y, (batch, tokens, self.q_size)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with its norm before the residual connection."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        self.self_attn = Attention(f"{prefix}.self_attn", config, planner, target)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, target)
        self.mlp = decoder.MLP(f"{prefix}.mlp", config, planner, target)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Run one layer over x (batch, tokens, hidden)."""
        x = x + self.post_attention_layernorm(self.self_attn(x, cache, layer))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Decoder(decoder.Decoder):
    """The decoder with layers of this family."""

    layer_type = DecoderLayer


class Network(decoder.CausalLM):
    """The language model."""

    decoder_type = Decoder
