"""Llama 1, 2 and 3: grouped-query attention, optional biases, default/linear/llama3 rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.models.config import DecoderConfig, parse_decoder

MODEL_TYPE = "llama"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Llama config.json."""
    attention_bias = bool(config.get("attention_bias", False))
    return parse_decoder(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
