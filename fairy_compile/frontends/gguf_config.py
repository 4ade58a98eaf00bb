"""What the metadata of a Fairy2i GGUF file say: its layout, and its model as a config.json.

The keys are those of the authors' llama.cpp (docs/fairy2i/spec.md there, schema versions 1 to 3).
Sizes count complex numbers; config.json counts real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.gguf_codes import BRANCHES
from fairy_compile.frontends.gguf_file import GgufFile

ARCHITECTURE = "fairy2i"
BASES = ("llama", "qwen2", "qwen3")
"""Architectures that such files are of: the ``model_type`` of config.json."""
LARGEST = (1 << 24) - 1
"""Of whole numbers, as in a config.json."""

_VARIANTS = {"tile64_v2": 2, "tile64_v2_w1_learned_scale": 1}
_FORMATS = ("fairy2i_tile64_v2", "ifairy64")
_BUNDLE = {
    "fairy2i.weight.layout": "bundle_m64k64_v1",
    "fairy2i.weight.scale_scope": "m64_k64",
    "fairy2i.weight.code_order": "m16_q4_branch_lane",
    "fairy2i.weight.m_block": 64,
    "fairy2i.weight.k_block": 64,
    "fairy2i.weight.m_subtile": 16,
}


@dataclass(frozen=True)
class GgufModel:
    """A model as a file's metadata describe it.

    Attributes:
        stages: T.
        bundle: whether layers have the layout of bundles, see `gguf_codes`.
        width: complex numbers of a hidden state.
        vocab: tokens, without those a vocabulary was padded with; None if the file does not tell.
        config: config.json of the model, but for ``vocab_size`` and biases.
    """

    stages: int
    bundle: bool
    width: int
    vocab: int | None
    config: dict[str, Any]


def read_model(file: GgufFile) -> GgufModel:
    """Read the metadata of a Fairy2i file.

    Raises:
        ModelFileError: keys are missing or of another type.
        UnsupportedError: the file is of another architecture, or of a format not known here.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != ARCHITECTURE:
        raise UnsupportedError(
            f"{file.path} has the architecture {f'{architecture!r:.80}'}; GGUF files are read of "
            f"Fairy2i models alone ({ARCHITECTURE!r}): give the Hugging Face directory of the model"
        )
    read = _Reader(file)
    if (parts := read.whole("split.count", 1, least=0)) > 1:
        raise UnsupportedError(
            f"{file.path} is one of {parts} parts of a model; put them together with llama.cpp's "
            "`llama-gguf-split --merge FIRST WHOLE`"
        )
    read.choose("fairy2i.schema_version", (1, 2, 3))
    read.choose("fairy2i.quant.format", _FORMATS)
    read.choose("fairy2i.quant.codebook", ("{+/-1,+/-i}",))
    read.choose("fairy2i.quant.tile_size", (64,))
    variant = read.choose("fairy2i.quant.variant", tuple(_VARIANTS))
    stages = read.choose("fairy2i.quant.residual_steps", (_VARIANTS[variant],))
    base = read.choose("fairy2i.base_arch", BASES)
    read.choose("fairy2i.attn.layout", (f"{base}_real",))
    bundle = "fairy2i.weight.layout" in file.metadata
    if bundle:
        for key, value in _BUNDLE.items():
            read.choose(key, (value,))
        read.choose("fairy2i.weight.branch_order", (BRANCHES[stages],))
    vocab = "fairy2i.vocab.original_size"
    width = read.whole("fairy2i.embedding_length")
    return GgufModel(
        stages,
        bundle,
        width,
        read.whole(vocab) if vocab in file.metadata else None,
        _config(read, base, width),
    )


def _config(read: _Reader, base: str, width: int) -> dict[str, Any]:
    heads = read.whole("fairy2i.attention.head_count")
    head_dim = _head_dim(read, width, heads)
    kv_heads = read.whole("fairy2i.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"{read.path} has fairy2i.attention.head_count = {heads} and head_count_kv = "
            f"{kv_heads}; the first must be a multiple of the second"
        )
    return {
        "model_type": base,
        "architectures": [f"{base.capitalize()}ForCausalLM"],
        "hidden_size": 2 * width,
        "intermediate_size": 2 * read.whole("fairy2i.feed_forward_length"),
        "num_hidden_layers": read.whole("fairy2i.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": read.whole("fairy2i.context_length"),
        "rms_norm_eps": read.number("fairy2i.attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("fairy2i.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **_rope(read),
        **_tokens(read),
    }


def _head_dim(read: _Reader, width: int, heads: int) -> int:
    """Return the real numbers of a head, all of which are rotated."""
    keys = [
        key
        for key in (
            "fairy2i.attention.key_length",
            "fairy2i.attention.value_length",
            "fairy2i.rope.dimension_count",
        )
        if key in read.metadata
    ]
    found = {key: read.whole(key) for key in keys}
    if len(set(found.values())) > 1:
        raise UnsupportedError(
            f"{read.path} has {', '.join(f'{key} = {size}' for key, size in found.items())}; "
            "allowed: one size of heads, whose keys and values are as long and rotated as a whole"
        )
    if found:
        return found[keys[0]]
    if 2 * width % heads:
        raise ModelFileError(
            f"{read.path} has {heads} heads for fairy2i.embedding_length = {width}, {2 * width} "
            "real numbers, and no fairy2i.rope.dimension_count; allowed: heads that divide them"
        )
    return 2 * width // heads


def _rope(read: _Reader) -> dict[str, Any]:
    prefix = "fairy2i.rope.scaling"
    kind = read.choose(f"{prefix}.type", ("none", "linear", "yarn"), default="none")
    if kind == "none":
        return {}
    factor = read.number(f"{prefix}.factor")
    if kind == "linear":
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}
    # llama.cpp multiplies its factor on attention by the one YaRN has by default.
    given = read.number(f"{prefix}.attn_factor", 1.0)
    scaling = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": read.whole(f"{prefix}.original_context_length"),
        "attention_factor": given * (1 + 0.1 * math.log(factor) if factor > 1 else 1.0),
    }
    for key in ("beta_fast", "beta_slow"):
        if f"{prefix}.yarn_{key}" in read.metadata:
            scaling[key] = read.number(f"{prefix}.yarn_{key}")
    return {"rope_scaling": scaling}


def _tokens(read: _Reader) -> dict[str, Any]:
    ids = {name: f"tokenizer.ggml.{key}_token_id" for name, key in _TOKENS.items()}
    return {
        f"{name}_token_id": read.whole(key, least=0)
        for name, key in ids.items()
        if key in read.metadata
    }


# Names in config.json -> in GGUF.
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


class _Reader:
    """Reads metadata, each value checked."""

    def __init__(self, file: GgufFile) -> None:
        self.metadata, self.path = file.metadata, file.path

    def _refuse(self, key: str, allowed: str) -> ModelFileError:
        if key not in self.metadata:
            return ModelFileError(
                f"{self.path} lacks the metadata entry {key}; files of the first experiments have "
                "none: make it again with the present converter"
            )
        value = f"{self.metadata[key]!r:.80}"
        return ModelFileError(f"{self.path} has {key} = {value}; allowed: {allowed}")

    def choose(self, key: str, allowed: tuple, default: Any = None) -> Any:
        """Return the value of a key, one of ``allowed``."""
        value = self.metadata.get(key, default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self._refuse(key, ", ".join(map(repr, allowed)))
        return value

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number."""
        value = self.metadata.get(key, default)
        if type(value) is not int or not least <= value <= LARGEST:
            raise self._refuse(key, f"whole numbers from {least} to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number, a float32 one with the digits it was given with."""
        value = self.metadata.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._refuse(key, "positive numbers")
        return float(str(np.float32(value)))
