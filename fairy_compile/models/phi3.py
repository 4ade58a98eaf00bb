"""Phi-3, Phi-3.5 (dense) and Phi-4: Llama with one matrix for QKV and one for gate and up.

The published rule quantises matrices as checkpoints hold them, so these stay whole: their complex
rows pair the first half of all outputs with the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairy_compile.models import decoder
from fairy_compile.models.config import DecoderConfig, parse_decoder
from fairy_compile.models.linear import LinearCall, LinearPlanner

MODEL_TYPE = "phi3"


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Phi-3 or Phi-4 config.json."""
    return parse_decoder({"rms_norm_eps": 1e-5} | dict(config), local=lambda layer: True)


class Attention(decoder.Attention):
    """Attention with one matrix for queries, keys and values."""

    def plan_qkv(self, prefix: str, planner: LinearPlanner) -> list[LinearCall]:
        """See `decoder.Attention.plan_qkv`."""
        name, rows = f"{prefix}.qkv_proj", self.q_size + 2 * self.kv_size
        return planner.linear(name, [name], self.config.hidden_size, [rows])


class MLP(decoder.MLP):
    """Feed-forward layer with one matrix for gate and up."""

    def plan_gate_up(self, prefix: str, planner: LinearPlanner) -> list[LinearCall]:
        """See `decoder.MLP.plan_gate_up`."""
        name, rows = f"{prefix}.gate_up_proj", 2 * self.config.intermediate_size
        return planner.linear(name, [name], self.config.hidden_size, [rows])


class DecoderLayer(decoder.DecoderLayer):
    """A layer of these."""

    attention_type = Attention
    mlp_type = MLP


class Decoder(decoder.Decoder):
    """The decoder with layers of this family."""

    layer_type = DecoderLayer


class Network(decoder.CausalLM):
    """The language model."""

    decoder_type = Decoder
