"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.models import moe
from fairy_compile.models.config import DecoderConfig, ExpertNames, parse_decoder

MODEL_TYPE = "mixtral"
Network = moe.Network
_NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
_DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Mixtral config.json."""
    config = _DEFAULTS | dict(config)
    sizes = moe.mixture_sizes(config, "num_local_experts")
    return parse_decoder(
        config,
        local=lambda layer: True,
        expert_size=config["intermediate_size"],
        expert_names=_NAMES,
        **sizes,
    )
