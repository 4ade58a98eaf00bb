"""Tiny models to train; PyTorch on one thread, so that test processes do not fight for cores."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.tiny_models import SIZES
from tests.torch_threads import one_thread  # noqa: F401

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma": ("Gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 12}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", {}),
}


@pytest.fixture(scope="session")
def make_model():
    """Return make(family, **changes): a random tiny causal LM in training mode."""

    def make(family: str = "llama", **changes):
        name, extra = FAMILIES[family]
        sizes = {**SIZES, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        config_name = "Gemma3Text" if name == "Gemma3" else name
        config = getattr(transformers, f"{config_name}Config")(**{**sizes, **extra, **changes})
        torch.manual_seed(7)
        return getattr(transformers, f"{name}ForCausalLM")(config).train()

    return make


@pytest.fixture
def tokens():
    return torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.manual_seed(1))
