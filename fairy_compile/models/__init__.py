"""Model families, one file each, found by config.json's ``model_type``.

A family file has ``MODEL_TYPE`` and ``parse(config) -> DecoderConfig``; its network is
`decoder.CausalLM` unless it brings its own, called ``Network``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.errors import UnsupportedError, nearest
from fairy_compile.models import (
    gemma2,
    gemma3,
    ifairy,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    stablelm,
)
from fairy_compile.models.config import DecoderConfig
from fairy_compile.models.decoder import CausalLM

_FAMILIES = (
    gemma2,
    gemma3,
    ifairy,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    stablelm,
)
FAMILIES = {family.MODEL_TYPE: family for family in _FAMILIES}


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the sizes of the model a config.json describes.

    Raises:
        UnsupportedError: unknown ``model_type``; the message lists the known ones.
        ModelFileError: a value is missing or out of range.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = sorted(FAMILIES)
        raise UnsupportedError(
            f"unknown architecture {kind!r} in config.json; known: {', '.join(known)}."
            f"{nearest(str(kind), known)}"
        )
    return FAMILIES[kind].parse(config)


def network_of(config: DecoderConfig) -> type[CausalLM]:
    """Return the class of a model's network: Network(config, planner, target)."""
    return getattr(FAMILIES[config.model_type], "Network", CausalLM)


__all__ = ["FAMILIES", "DecoderConfig", "network_of", "parse_config"]
