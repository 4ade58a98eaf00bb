"""Small model directories on disk, written without the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8"}


def safetensors_bytes(tensors: dict[str, np.ndarray], **header_changes: object) -> bytes:
    """Encode tensors; ``header_changes`` replace or add header entries."""
    header: dict[str, object] = {}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header | header_changes).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    return struct.pack("<Q", len(text)) + text + data


def write_index(directory: Path, weight_map: dict[str, str], name: str = "model.safetensors"):
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def tiny_tensors(dtype: object = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """A model of one layer: embedding, norm, bias, an even and an odd linear layer, a head."""
    rng = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (10, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 12),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.mlp.up_proj.weight": (140, 8),
        "model.layers.0.mlp.odd_proj.weight": (33, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "lm_head.weight": (10, 8),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return tiny_tensors()


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a Hugging Face directory and returns it."""

    def make(
        tensors: dict[str, np.ndarray] | None = None, name: str = "model", shards: int = 1
    ) -> Path:
        tensors = tiny_tensors() if tensors is None else tensors
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
        (directory / "tokenizer.json").write_text("{}")
        (directory / "generation_config.json").write_text("{}")
        if shards == 1:
            (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
            return directory
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensors[key] for key in list(tensors)[i::shards]}
            (directory / file).write_bytes(safetensors_bytes(part))
            weight_map |= dict.fromkeys(part, file)
        write_index(directory, weight_map)
        return directory

    return make


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
