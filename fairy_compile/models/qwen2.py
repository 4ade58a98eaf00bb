"""Qwen2 and Qwen2.5: Llama with biases on Q, K and V, often with tied embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.models.config import DecoderConfig, parse_decoder

MODEL_TYPE = "qwen2"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen2 config.json."""
    return parse_decoder(config, qkv_bias=True)
