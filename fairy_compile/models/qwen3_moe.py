"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with many small experts in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.errors import ModelFileError
from fairy_compile.models import moe
from fairy_compile.models.config import DecoderConfig, ExpertNames, parse_decoder
from fairy_compile.models.values import positive_int

MODEL_TYPE = "qwen3_moe"
Network = moe.Network
_NAMES = ExpertNames("mlp", gate="gate_proj", up="up_proj", down="down_proj")


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen3-MoE config.json."""
    biased = bool(config.get("attention_bias", False))
    sizes = moe.mixture_sizes(
        {"num_experts": 128, "num_experts_per_tok": 8} | dict(config),
        # transformers 5 writes the second name.
        *("num_local_experts", "num_experts"),
    )
    layers, step = positive_int(config, "num_hidden_layers"), _step(config)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ModelFileError(f"config.json has mlp_only_layers = {dense!r}; expected a list")
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    return parse_decoder(
        config,
        local=(lambda layer: True) if config.get("use_sliding_window") else None,
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=True,
        expert_size=positive_int(config, "moe_intermediate_size", 768),
        sparse_layers=sparse,
        normalize_experts=bool(config.get("norm_topk_prob", False)),
        expert_names=_NAMES,
        **sizes,
    )


def _step(config: Mapping[str, Any]) -> int:
    return positive_int(config, "decoder_sparse_step", 1)
