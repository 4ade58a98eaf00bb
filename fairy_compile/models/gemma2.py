"""Gemma 2 (arXiv 2408.00118): norms around every sub-layer, soft-capped scores and logits.

Every other layer attends over a sliding window. Norms multiply by one plus their weight, embedded
tokens by sqrt(hidden_size), and scores by ``query_pre_attn_scalar``^-1/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.errors import UnsupportedError
from fairy_compile.models import decoder
from fairy_compile.models.config import DecoderConfig, parse_decoder
from fairy_compile.models.elementwise import OffsetRMSNorm
from fairy_compile.models.linear import LinearPlanner
from fairy_compile.models.values import positive_float

MODEL_TYPE = "gemma2"
_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Gemma 2 config.json."""
    return parse_gemma(_DEFAULTS | dict(config), local=lambda layer: layer % 2 == 0)


def parse_gemma(config: Mapping[str, Any], **family: Any) -> DecoderConfig:
    """Read what Gemma 2 and 3 have in common.

    Raises:
        UnsupportedError: tokens are to attend to later ones, as in embedding models.
    """
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError(
            "config.json sets use_bidirectional_attention; supported: language models, in which "
            "tokens attend to earlier ones"
        )
    biased = bool(config.get("attention_bias", False))
    caps = {
        field: None if config.get(key) is None else positive_float(config, key)
        for field, key in (
            ("attention_softcap", "attn_logit_softcapping"),
            ("logit_softcap", "final_logit_softcapping"),
        )
    }
    scale = positive_float(config, "query_pre_attn_scalar", 256.0) ** -0.5
    return parse_decoder(
        config,
        qkv_bias=biased,
        o_bias=biased,
        attention_scale=scale,
        wide_activations=True,
        **caps,
        **family,
    )


class Attention(decoder.Attention):
    """Attention with norms of this family, where it has some on heads."""

    norm_type = OffsetRMSNorm


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each between two norms, with residual connections."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = OffsetRMSNorm(size, eps, target)
        self.self_attn = Attention(f"{prefix}.self_attn", config, planner, target)
        self.post_attention_layernorm = OffsetRMSNorm(size, eps, target)
        self.pre_feedforward_layernorm = OffsetRMSNorm(size, eps, target)
        self.mlp = decoder.MLP(f"{prefix}.mlp", config, planner, target)
        self.post_feedforward_layernorm = OffsetRMSNorm(size, eps, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Run one layer over x (batch, tokens, hidden)."""
        attended = self.self_attn(self.input_layernorm(x), cache, layer)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(decoder.Decoder):
    """The decoder with layers of this family."""

    layer_type = DecoderLayer
    norm_type = OffsetRMSNorm

    def embed_scale(self, config: DecoderConfig, planner: LinearPlanner) -> float:
        """Return sqrt(hidden_size) in the dtype of the checkpoint's embedding.

        The models were trained with a factor rounded like that: of bfloat16, 55.5 for 55.43.
        """
        dtype = planner.source_dtype("model.embed_tokens.weight")
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        return float(np.asarray(math.sqrt(config.hidden_size), kind))


class Network(decoder.CausalLM):
    """The language model."""

    decoder_type = Decoder
