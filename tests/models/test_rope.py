"""Rope tables of every rule against transformers, from the config.json it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fairy_compile.models import parse_config
from tests.tiny_models import (
    DYNAMIC,
    LLAMA3_ROPE,
    LONG,
    LONGROPE,
    NO_TOKENS,
    PARTIAL_ROPE,
    SIZES,
    YARN,
)

# Name -> (family, config, contexts at which transformers computes the table anew).
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "default": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, (64,)),
    "linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        (64,),
    ),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}, (64,)),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC}, (64, 256, 257, 1000)),
    "yarn": ("Llama", {"rope_parameters": YARN}, (64,)),
    "yarn_mscale": (
        "Llama",
        {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7}},
        (64,),
    ),
    "yarn_options": (
        "Llama",
        {
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False}
        },
        (64,),
    ),
    "longrope": ("Phi3", {**NO_TOKENS, "rope_parameters": LONGROPE, **LONG}, (128, 129, 256)),
    "longrope_factor": (
        "Phi3",
        {**NO_TOKENS, "rope_parameters": LONGROPE | {"attention_factor": 1.5}, **LONG},
        (128, 129),
    ),
    "partial": ("Phi3", {**NO_TOKENS, "rope_parameters": PARTIAL_ROPE}, (64,)),
    "stablelm": ("StableLm", {}, (64,)),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, changes, contexts = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config.save_pretrained(tmp_path)
    ours = parse_config(json.loads((tmp_path / "config.json").read_text()))
    for context in contexts:
        want, amplitude = reference(config, context)
        table = ours.rope.table(ours.head_dim, context)
        # The base of a stretched context is a power, which both round in float32.
        np.testing.assert_allclose(table.array(), want, rtol=2e-6)
        assert table.amplitude == pytest.approx(amplitude, rel=1e-6)


def reference(config: Any, context: int) -> tuple[np.ndarray, float]:
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=context)
        return frequencies.numpy(), amplitude
    head_dim = config.hidden_size // config.num_attention_heads
    size = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, size, 2, dtype=torch.float) / size
    return (1.0 / config.rope_parameters["rope_theta"] ** exponents).numpy(), 1.0
