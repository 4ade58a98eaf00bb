"""Qwen3 (dense): RMSNorm on the heads of Q and K before rope, head_dim set by config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.models.config import DecoderConfig, parse_decoder
from fairy_compile.models.qwen2 import local_layers

MODEL_TYPE = "qwen3"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen3 config.json."""
    attention_bias = bool(config.get("attention_bias", False))
    return parse_decoder(
        config,
        local=local_layers(config),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm=True,
    )
