"""Qwen2 and Qwen2.5: Llama with biases on Q, K and V, often with tied embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fairy_compile.models.config import DecoderConfig, parse_decoder

MODEL_TYPE = "qwen2"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen2 config.json."""
    return parse_decoder(config, local=local_layers(config), qkv_bias=True)


def local_layers(config: Mapping[str, Any]) -> Callable[[int], bool] | None:
    """Return which layers have sliding windows, if the checkpoint uses them: the upper ones."""
    if not config.get("use_sliding_window", False):
        return None
    first = config.get("max_window_layers", 28)
    return lambda layer: layer >= first
