"""Which type llama.cpp's own quantiser gives every tensor of a model, and how its blocks look.

Source: ggml's block structures (``ggml-common.h``) and the rules of ``llama-quantize``
(``llama-quant.cpp``), for the architectures fairy_compile has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fairy_compile.config import check_choice
from fairy_compile.models import DecoderConfig


@dataclass(frozen=True)
class BlockType:
    """A ggml tensor type.

    Attributes:
        name: ggml's name.
        weights: weights in a block.
        nbytes: bytes of a block.
        scales: offsets of the block's float16 scales.
    """

    name: str
    weights: int
    nbytes: int
    scales: tuple[int, ...] = ()


BLOCK_TYPES = {
    t.name: t
    for t in (
        BlockType("F32", 1, 4),
        BlockType("F16", 1, 2),
        BlockType("Q4_0", 32, 18, (0,)),
        BlockType("Q5_0", 32, 22, (0,)),
        BlockType("Q8_0", 32, 34, (0,)),
        BlockType("Q2_K", 256, 84, (80, 82)),
        BlockType("Q3_K", 256, 110, (108,)),
        BlockType("Q4_K", 256, 144, (0, 2)),
        BlockType("Q6_K", 256, 210, (208,)),
        BlockType("TQ2_0", 256, 66, (64,)),
    )
}

# Rows that blocks of 256 do not divide get a type with blocks of 32.
_NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q6_K": "Q8_0"}

PEER_TYPES = ("Q4_K_M", "Q2_K", "TQ2_0", "Q4_0", "Q8_0", "F16")
"""Mixes that `tensor_plan` knows, by llama.cpp's names."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: GGUF name, shape (rows, columns) or (length,), and type."""

    name: str
    shape: tuple[int, ...]
    type: BlockType

    @property
    def nbytes(self) -> int:
        """Stored size."""
        count = 1
        for size in self.shape:
            count *= size
        return count // self.type.weights * self.type.nbytes


def tensor_plan(config: DecoderConfig, mix: str) -> Iterator[TensorPlan]:
    """Yield the tensors of a model as ``llama-quantize`` would store them.

    Args:
        config: sizes of the model.
        mix: one of `PEER_TYPES`.

    Raises:
        FairyError: an unknown mix.
    """
    check_choice("--peer-types", mix, PEER_TYPES)
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    kv, ffn = config.num_kv_heads * config.head_dim, config.intermediate_size

    def matrix(name: str, rows: int, columns: int, kind: str) -> TensorPlan:
        return TensorPlan(f"{name}.weight", (rows, columns), _fitting(kind, columns))

    def vector(name: str, size: int) -> TensorPlan:
        return TensorPlan(name, (size,), BLOCK_TYPES["F32"])

    # A tied embedding is also the head, and typed like one.
    embedding = _head(mix) if config.tie_word_embeddings else _embedding(mix)
    yield matrix("token_embd", config.vocab_size, hidden, embedding)
    yield vector("output_norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield matrix("output", config.vocab_size, hidden, _head(mix))
    for layer in range(config.num_layers):
        at = f"blk.{layer}."
        yield vector(f"{at}attn_norm.weight", hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            kind = _value(mix, config, layer) if name == "v" else _plain(mix)
            yield matrix(f"{at}attn_{name}", rows, hidden, kind)
            if config.qkv_bias:
                yield vector(f"{at}attn_{name}.bias", rows)
            if config.qk_norm and name != "v":
                yield vector(f"{at}attn_{name}_norm.weight", config.head_dim)
        yield matrix(f"{at}attn_output", hidden, q, "Q3_K" if mix == "Q2_K" else _plain(mix))
        if config.o_bias:
            yield vector(f"{at}attn_output.bias", hidden)
        yield vector(f"{at}ffn_norm.weight", hidden)
        for name, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden)):
            yield matrix(f"{at}ffn_{name}", rows, columns, _plain(mix))
            if config.mlp_bias:
                yield vector(f"{at}ffn_{name}.bias", rows)
        yield matrix(f"{at}ffn_down", hidden, ffn, _down(mix, config, layer))
        if config.mlp_bias:
            yield vector(f"{at}ffn_down.bias", hidden)


def _plain(mix: str) -> str:
    return "Q4_K" if mix == "Q4_K_M" else mix


def _head(mix: str) -> str:
    return mix if mix in ("F16", "Q8_0") else "Q6_K"


def _embedding(mix: str) -> str:
    return "Q4_K" if mix == "TQ2_0" else _plain(mix)


def _value(mix: str, config: DecoderConfig, layer: int) -> str:
    if mix == "Q2_K":
        return "Q4_K" if config.num_heads >= 4 * config.num_kv_heads else "Q3_K"
    if mix == "Q4_K_M" and _more_bits(layer, config.num_layers):
        return "Q6_K"
    return _plain(mix)


def _down(mix: str, config: DecoderConfig, layer: int) -> str:
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "Q4_K_M" and _more_bits(layer, config.num_layers):
        return "Q6_K"
    return _plain(mix)


def _more_bits(layer: int, layers: int) -> bool:
    """Tell whether the "medium" mixes spend more bits on a layer: both ends, and every third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: str, columns: int) -> BlockType:
    for name in (kind, _NARROW.get(kind, kind), "F16"):
        if columns % BLOCK_TYPES[name].weights == 0:
            return BLOCK_TYPES[name]
    raise AssertionError("F16 fits every row")
