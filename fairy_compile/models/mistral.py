"""Mistral: Llama without biases, with a sliding window in all layers of its first version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.models.config import DecoderConfig, parse_decoder

MODEL_TYPE = "mistral"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Mistral config.json."""
    return parse_decoder(config, local=lambda layer: True)
