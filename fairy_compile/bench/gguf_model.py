"""Random models as GGUF files: real shapes and block formats, weights without meaning.

Speed does not depend on what the weights say, so nothing is quantised: blocks hold random bits and
a scale that keeps activations finite. Positions are rotated with the model's base frequency;
scaled rope (linear, llama3) is left out because it costs nothing per token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.files import human_bytes
from fairy_compile.bench.gguf_types import BlockType, TensorPlan, tensor_plan
from fairy_compile.errors import FairyError
from fairy_compile.models import DecoderConfig
from fairy_compile.user_cache import cache_directory

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""config.json's ``model_type`` -> name of the architecture in GGUF."""

_SCALE = np.float16(1e-4)  # the smallest power of ten that is no subnormal float16
_FILE_VERSION = 1  # part of file names: raise it when the content changes


@dataclass(frozen=True)
class PeerModel:
    """A GGUF file.

    Attributes:
        path: where it lies.
        mix: llama.cpp's name of its types.
        tensor_types: type -> bytes stored in it.
    """

    path: Path
    mix: str
    tensor_types: dict[str, int]


def default_cache() -> Path:
    """Return the user's cache directory for generated models."""
    return cache_directory() / "peers"


def peer_model(
    config: DecoderConfig,
    mix: str,
    cache: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> PeerModel:
    """Return the random model of ``config`` in ``mix``, written to ``cache`` unless it is there.

    Raises:
        FairyError: unknown mix, an architecture llama.cpp's loader has no name for, no room.
    """
    plan = list(tensor_plan(config, mix))
    if config.model_type not in ARCHITECTURES:
        raise FairyError(
            f"cannot make a llama.cpp model of family {config.model_type!r}; allowed: "
            f"{', '.join(ARCHITECTURES)}"
        )
    path = cache / f"{config.model_type}-{_shape_hash(config)}-{mix}.gguf"
    if not path.exists():
        size = sum(t.nbytes for t in plan)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(cache).free
        except OSError as error:
            raise FairyError(f"cannot use {cache} for llama.cpp models: {error}") from error
        if free < size + (64 << 20):
            raise FairyError(
                f"{cache} has {human_bytes(free)} free, and {path.name} needs {human_bytes(size)}; "
                "free some, or name another directory with --peer-cache"
            )
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            _write(partial, config, mix, plan, progress)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return PeerModel(path, mix, _bytes_per_type(plan))


def _shape_hash(config: DecoderConfig) -> str:
    text = json.dumps([_FILE_VERSION, asdict(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bytes_per_type(plan: Iterable[TensorPlan]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in plan:
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return sizes


def _write(
    path: Path,
    config: DecoderConfig,
    mix: str,
    plan: list[TensorPlan],
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Write header and tensors one by one; memory holds one tensor at a time."""
    import gguf

    writer = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
    _add_metadata(writer, config, mix)
    for tensor in plan:
        kind = gguf.GGMLQuantizationType[tensor.type.name]
        # uint8 tells the writer that the shape is in bytes, not weights.
        columns = tensor.shape[-1] // tensor.type.weights * tensor.type.nbytes
        shape = (*tensor.shape[:-1], columns)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.Generator(np.random.SFC64(0))
    for done, tensor in enumerate(plan):
        if progress is not None:
            progress(f"{mix} {tensor.name}", done, len(plan))
        writer.write_tensor_data(random_blocks(tensor, rng))
    writer.close()


def _add_metadata(writer: Any, config: DecoderConfig, mix: str) -> None:
    import gguf

    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{mix}"])
    writer.add_name(f"random {config.model_type} {mix}")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # Tokens go in as numbers: llama.cpp then needs the size of a vocabulary, but no tokens.
    writer.add_tokenizer_model("none")


def random_blocks(tensor: TensorPlan, rng: np.random.Generator) -> np.ndarray:
    """Return the stored form of a tensor: uint8 [rows, bytes of a row].

    Norms are ones, biases zeros, float16 weights small; blocks have random bits and small scales.
    """
    kind = tensor.type
    if kind.name == "F32":
        value = 0.0 if tensor.name.endswith(".bias") else 1.0
        return np.full(tensor.shape, value, np.float32).view(np.uint8)
    if kind.name == "F16":
        values = rng.random(tensor.shape, np.float32) * np.float32(0.04) - np.float32(0.02)
        return values.astype(np.float16).view(np.uint8)
    blocks = tensor.nbytes // kind.nbytes
    data = rng.integers(0, 256, (blocks, kind.nbytes), np.uint8)
    if kind.name == "TQ2_0":
        data = _TERNARY[data]
    _set_scales(data, kind)
    return data.reshape(tensor.shape[0], -1)


def _set_scales(data: np.ndarray, kind: BlockType) -> None:
    scale = np.frombuffer(_SCALE.tobytes(), np.uint8)
    for offset in kind.scales:
        data[:, offset : offset + 2] = scale


def _ternary_bytes() -> np.ndarray:
    """Return byte -> the same byte with every two-bit code 3, which ternary lacks, made 1."""
    codes = np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3
    codes[codes == 3] = 1
    return (codes << np.arange(0, 8, 2)).sum(axis=1).astype(np.uint8)


_TERNARY = _ternary_bytes()
