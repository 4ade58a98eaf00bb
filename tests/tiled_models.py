"""Tiny models whose scales belong to tiles of 64x64, each as its authors store it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from fairy_compile.runtime.model import Model
from tests import tiny_fairy2i
from tests.tiny_gguf import Fairy2i
from tests.tiny_models import relative_error, save_tokenizer

TILED_MODELS = ("gguf_w2", "gguf_w1", "learned_w1")
TOKENS = np.random.default_rng(5).integers(0, 256, 40).tolist()
STEPS = 6


def save_tiled(name: str, directory: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """Write a model of `TILED_MODELS`; return where it is, and PyTorch's of the same numbers."""
    if name == "learned_w1":
        source = tiny_fairy2i.save_learned(directory / name)
        return source, tiny_fairy2i.torch_model(source)
    model = {
        "gguf_w2": Fairy2i("llama"),
        "gguf_w1": Fairy2i("qwen3", 1, bundle=True, merged=True),
    }[name]
    save_tokenizer(directory)
    return model.save(directory / f"{name}.gguf"), model.torch_model()


def largest_logit_error(model: Model, oracle: transformers.PreTrainedModel) -> float:
    """Return the larger relative error of a whole prompt and of single tokens after one."""
    with torch.no_grad():
        want = oracle(torch.tensor([TOKENS])).logits[0].float().numpy()
    engine = model.engine
    sequence = engine.add_sequence()
    engine.prefill(sequence, TOKENS[:-STEPS])
    stepped = [engine.decode([sequence], [token])[0] for token in TOKENS[-STEPS:]]
    engine.remove_sequence(sequence)
    return max(
        relative_error(model.logits(TOKENS), want),
        relative_error(np.stack(stepped), want[-STEPS:]),
    )
