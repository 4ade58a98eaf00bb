"""Tiny Fairy2i models as their authors store them, and what they compute by their definition."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny_models import name_it, save_model

TILE = 64
# Every complex dimension is a multiple of 64, the least tile there is; Q and K differ in rows.
TILED = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.06,
}


def save_learned(directory: Path, family: str = "qwen3", dtype: str = "bfloat16") -> Path:
    """Write a random W1 model with learned scales; some are negative, one is zero."""
    save_model(directory, family, dtype, **TILED)
    name_it(directory, "tests/tiny")  # only their scales tell what the weights are
    path = directory / "model.safetensors"
    tensors = load_file(path)
    rng = np.random.default_rng(11)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scales = rng.uniform(0.02, 0.08, (4, rows // 128, columns // 128))
        scales.reshape(-1)[::7] *= -1
        scales.reshape(-1)[3] = 0
        stored = torch.from_numpy(scales).to(getattr(torch, dtype))
        tensors[name.removesuffix("weight") + "quant_scale"] = stored
    save_file(tensors, path, {"format": "pt"})
    return directory


def by_definition(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the real map of master weights with learned scales, in complex float64.

    Args:
        weight: (2n, 2m), float32 or bfloat16.
        scales: (4, n/64, m/64).
    """
    n, m = weight.shape[0] // 2, weight.shape[1] // 2
    dtype = weight.dtype if weight.dtype == ml_dtypes.bfloat16 else np.float64
    a = weight.astype(np.float64)
    a11, a12, a21, a22 = a[:n, :m], a[:n, m:], a[n:, :m], a[n:, m:]
    terms = []
    for k, (re, im) in enumerate([(a11 + a22, a21 - a12), (a11 - a22, a12 + a21)]):
        re, im = (part.astype(dtype).astype(np.float64) / 2 for part in (re, im))
        s_re, s_im = (np.kron(s, np.ones((TILE, TILE))) for s in scales[2 * k : 2 * k + 2])
        plus_re, plus_im = (np.where(part >= 0, 1, -1) for part in (re, im))
        terms.append(np.where(abs(re) > abs(im), plus_re * s_re + 0j, 1j * plus_im * s_im))
    u, w = terms
    # y = U x + W conj(x), written out for [Re; Im].
    return np.block([[(u + w).real, (w - u).imag], [(u + w).imag, (u - w).real]])


def torch_model(directory: Path) -> transformers.PreTrainedModel:
    """Return the model of `save_learned` in PyTorch, float32, with the values it stands for."""
    tensors = load_file(directory / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: t.float() for name, t in tensors.items() if not name.endswith("quant_scale")}
    for name in weights:
        scale = tensors.get(name.removesuffix("weight") + "quant_scale")
        if scale is not None:
            stored = tensors[name].view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            value = by_definition(stored, scale.float().numpy())
            weights[name] = torch.from_numpy(value.astype(np.float32))
    model.load_state_dict(weights)
    return model
