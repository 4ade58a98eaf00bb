"""Where the tensors of a Fairy2i model lie in a GGUF file, which names them as llama.cpp does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends.gguf_codes import CodedLayer, find_layer
from fairy_compile.frontends.gguf_config import GgufModel
from fairy_compile.frontends.gguf_file import FLOATS, GgufFile
from fairy_compile.phase.tensor import TILE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"
# Names in the file -> in config.json's model, of one decoder layer.
_NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_QKV = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
}
_LINEARS = {
    **_QKV,
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class DensePlace:
    """Where a dense tensor lies.

    Attributes:
        tensor: its name in the file.
        shape, dtype: its own; of the embedding those of what its pairs hold.
        take: which of the entries there, along the first dimension, in which order.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    take: np.ndarray | slice


class Places:
    """The tensors of a model, under their Hugging Face names.

    Attributes:
        config: config.json, complete.
        layers: layer name -> `CodedLayer`.
        dense: tensor name -> `DensePlace`.
        rows: of the embedding, tokens that pad the vocabulary included.

    Raises:
        ModelFileError: tensors are missing, of other shapes, or unknown.
        UnsupportedError: Q, K and V share tiles.
    """

    def __init__(self, file: GgufFile, model: GgufModel) -> None:
        self._file, self._model, self._path = file, model, file.path
        self.config: dict[str, Any] = dict(model.config)
        self.layers: dict[str, CodedLayer] = {}
        self.dense: dict[str, DensePlace] = {}
        self.rows = 0
        self._used: set[str] = set()
        self._place()
        unknown = file.tensors.keys() - self._used
        if unknown:
            raise ModelFileError(
                f"{file.path} has the tensor {min(unknown)!r}, which no layer of its "
                f"{self.config['model_type']} model has; it was made by another converter than "
                "the one known here, or is damaged"
            )

    def _place(self) -> None:
        """Say where every tensor of the model lies in the file, and complete config.json."""
        config, width = self.config, self._model.width
        heads = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
            "attn_v": config["num_key_value_heads"],
        }
        rows = {name: count * config["head_dim"] // 2 for name, count in heads.items()}
        columns = dict.fromkeys(_LINEARS, width) | {
            "attn_output": rows["attn_q"],
            "ffn_down": config["intermediate_size"] // 2,
        }
        self._embedding()
        self._vector("output_norm", "model.norm.weight")
        if not self._coded("output", HEAD, width):
            vocab = config["vocab_size"]
            self._plain("output", f"{HEAD}.weight", (vocab, 2 * width), most=self.rows)
        elif (extra := self._name("output")) is not None:
            self._used.add(extra)  # the head is there twice, for comparisons
        for i in range(config["num_hidden_layers"]):
            block, layer = f"blk.{i}", f"model.layers.{i}"
            for name, ours in _NORMS.items():
                present = self._name(f"{block}.{name}") is not None
                if present or not name.endswith(("q_norm", "k_norm")):
                    self._vector(f"{block}.{name}", f"{layer}.{ours}.weight")
            merged = self._merged(f"{block}.attn_qkv", layer, rows)
            for name, ours in _LINEARS.items():
                if name in _QKV and merged:
                    continue
                if not self._coded(f"{block}.{name}", f"{layer}.{ours}", columns[name]):
                    raise self._lacks(f"{block}.{name}")
                self._vector(f"{block}.{name}.bias", f"{layer}.{ours}.bias", optional=True)
        if config["model_type"] != "qwen2":
            biased = any(name.endswith("_proj.bias") for name in self.dense)
            config["attention_bias"] = biased

    def _lacks(self, name: str) -> ModelFileError:
        layout = "bundles" if self._model.bundle else "tile64_v2"
        return ModelFileError(
            f"{self._path} lacks the layer {name} (in the layout of {layout}, T = "
            f"{self._model.stages}, as its metadata say); download it again"
        )

    def _name(self, name: str) -> str | None:
        """Return what a dense tensor is called: some converters leave ``.weight`` out."""
        return next((n for n in (name, f"{name}.weight") if n in self._file.tensors), None)

    def _embedding(self) -> None:
        name, width = self._name("token_embd"), self._model.width
        if name is None:
            raise self._lacks("token_embd")
        info = self._file.tensors[name]
        if len(info.shape) != 2 or info.type != 0 or info.shape[1] != width:
            raise ModelFileError(
                f"{self._path}: {name} has the type {info.type} and shape {info.shape}; expected "
                f"float32 (tokens, {width}), pairs of bfloat16"
            )
        self.rows = info.shape[0]
        vocab = self._model.vocab or self.rows
        if vocab > self.rows:
            raise ModelFileError(
                f"{self._path} has fairy2i.vocab.original_size = {vocab} and {self.rows} rows "
                f"of {name}; allowed: up to as many as there are rows"
            )
        if self._find("output", width) is not None:
            vocab = self.rows  # the rows of a coded head are not those of tokens
        for key in ("bos", "eos"):
            number = self.config.get(f"{key}_token_id", 0)
            if number >= vocab:
                raise ModelFileError(
                    f"{self._path} has tokenizer.ggml.{key}_token_id = {number}; allowed: one of "
                    f"its {vocab} tokens"
                )
        self.config["vocab_size"] = vocab
        self._used.add(name)
        shape = (vocab, 2 * width)
        self.dense[EMBEDDING] = DensePlace(name, shape, "bfloat16", slice(vocab))

    def _vector(self, name: str, ours: str, *, optional: bool = False) -> None:
        stored = self._name(name)
        if stored is None and optional:
            return
        if stored is None:
            raise self._lacks(name)
        shape = self._file.tensors[stored].shape
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        self._plain(name, ours, shape or (1,))

    def _plain(self, name: str, ours: str, shape: tuple[int, ...], most: int | None = None) -> None:
        """Note a dense tensor, of which the first rows are wanted where it has up to ``most``."""
        stored = self._name(name)
        if stored is None:
            raise self._lacks(name)
        info = self._file.tensors[stored]
        if info.type not in FLOATS:
            known = ", ".join(f"{n} ({d.name})" for n, d in FLOATS.items())
            raise ModelFileError(
                f"{self._path}: {stored} is of ggml's type {info.type}; allowed: {known}"
            )
        padded = (most or shape[0], *shape[1:])
        if tuple(size for size in info.shape if size != 1) != tuple(s for s in padded if s != 1):
            raise ModelFileError(
                f"{self._path}: {stored} has the shape {info.shape}; expected {padded}"
            )
        self._used.add(stored)
        dtype = FLOATS[info.type].name
        self.dense[ours] = DensePlace(stored, shape, dtype, slice(shape[0]))

    def _find(self, name: str, columns: int) -> CodedLayer | None:
        stages, bundle = self._model.stages, self._model.bundle
        layer = find_layer(self._file, name, stages, bundle=bundle, columns=columns)
        if layer is not None:
            self._used.update(layer.tensors())
        return layer

    def _coded(self, name: str, ours: str, columns: int) -> bool:
        """Note a layer with codes; return whether there is one."""
        layer = self._find(name, columns)
        if layer is not None:
            self.layers[ours] = layer
        return layer is not None

    def _merged(self, name: str, layer: str, rows: dict[str, int]) -> bool:
        """Note Q, K and V that lie one after the other in one layer, if they do."""
        whole = self._find(name, self._model.width)
        if whole is None:
            return False
        if whole.whole != sum(rows.values()):
            raise ModelFileError(
                f"{self._path}: {name} has {whole.whole} complex rows; its metadata ask for "
                f"{' + '.join(map(str, rows.values()))} of Q, K and V"
            )
        if any(count % TILE for count in rows.values()):
            raise UnsupportedError(
                f"{self._path}: {name} holds {' + '.join(map(str, rows.values()))} complex rows "
                f"of Q, K and V, which share tiles of {TILE}x{TILE}; allowed: multiples of {TILE} "
                "of each. Convert the model with Q, K and V apart"
            )
        bias = self._name(f"{name}.bias")
        first = 0
        for part, ours in _QKV.items():
            count = rows[part]
            self.layers[f"{layer}.{ours}"] = whole.rows(first, count)
            if bias is not None:
                # Real parts of Q, K and V, then imaginary ones.
                own = np.arange(first, first + count)
                self._plain(f"{name}.bias", f"{layer}.{ours}.bias", (2 * whole.whole,))
                dtype = self.dense[f"{layer}.{ours}.bias"].dtype
                take = np.concatenate([own, whole.whole + own])
                self.dense[f"{layer}.{ours}.bias"] = DensePlace(bias, take.shape, dtype, take)
            first += count
        return True
