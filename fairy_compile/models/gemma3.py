"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with norms on heads and a rope base for local layers.

Five of six layers attend over a sliding window. Checkpoints with images hold another model around
this one and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.errors import ModelFileError
from fairy_compile.models.config import DecoderConfig
from fairy_compile.models.gemma2 import Network, parse_gemma
from fairy_compile.models.rope import parse_rope
from fairy_compile.models.values import positive_int

MODEL_TYPE = "gemma3_text"
_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Gemma 3 text config.json."""
    config = _DEFAULTS | dict(config)
    pattern = positive_int(config, "sliding_window_pattern", 6)
    by_layer = config.get("rope_parameters")
    if by_layer is not None and not isinstance(by_layer, Mapping):
        raise ModelFileError(f"config.json has rope_parameters {by_layer!r}; expected an object")
    by_layer = by_layer or {}
    if "full_attention" in by_layer:
        rope = parse_rope({**config, "rope_theta": _THETA}, by_layer["full_attention"] or {})
    else:
        rope = parse_rope(config, config.get("rope_scaling") or {}, _THETA)
    local_theta = config.get("rope_local_base_freq", _LOCAL_THETA)
    local = parse_rope(
        {**config, "rope_theta": local_theta}, by_layer.get("sliding_attention") or {}
    )
    return parse_gemma(
        config,
        local=lambda layer: (layer + 1) % pattern != 0,
        qk_norm=True,
        rope=rope,
        local_rope=local,
    )


__all__ = ["MODEL_TYPE", "Network", "parse"]
