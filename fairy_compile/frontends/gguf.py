"""GGUF files of Fairy2i models, as the authors' llama.cpp reads them, as a `ModelSource`.

The layers' codes are in the file already (`gguf_codes`); embedding, norms, biases and as a rule the
output head are dense. Vectors of complex numbers lie as [Re; Im], which is how a real model has
them. The embedding is in bfloat16, in pairs that are written as one float32: the real part in the
lower half, the imaginary one in the upper.

A file has no directory of its own, so config.json and the tokenizer's files are written to a
temporary one. Where a tokenizer.json lies beside the file, it and its companions are taken instead,
unless its tokens are those of another model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from fairy_compile.artifact.files import hash_files, reading
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError, nearest
from fairy_compile.frontends.files import TOKENIZER_FILES, member
from fairy_compile.frontends.gguf_codes import CodedLayer, find_layer, read_layer
from fairy_compile.frontends.gguf_config import read_model
from fairy_compile.frontends.gguf_file import FLOATS, GgufFile
from fairy_compile.frontends.gguf_tokenizer import check_fit, write_config, write_tokenizer
from fairy_compile.frontends.own_codes import ordinary, plan_codes, settle_codes
from fairy_compile.frontends.plan import LayerPlan, quantize_layer
from fairy_compile.phase import PhaseTensor
from fairy_compile.phase.quantize import check_finite
from fairy_compile.phase.tensor import TILE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"
_CHUNK = 16 << 20
REASON, WITHOUT = "codes stored in the file", "stored dense in the file"
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
class _Dense:
    """A dense tensor: its name in the file, and which of the entries there, in which order."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    take: np.ndarray | slice


def _temporary_directory(owner: object) -> Path:
    """Return a new directory that goes with its owner, or at the end of the process.

    `tempfile.TemporaryDirectory` does that, too, with a warning for every one that was not closed,
    and sources have no end of their own.
    """
    directory = tempfile.mkdtemp(prefix="fairy-gguf-")
    weakref.finalize(owner, shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


class GgufSource:
    """A `ModelSource` over a GGUF file; see `fairy_compile.frontends.source`.

    Attributes:
        origin: the file.
        layers: layer name -> `CodedLayer`.
        trained: how the codes were made.

    Raises:
        ModelFileError: the file is damaged, or its tensors contradict its metadata.
        UnsupportedError: it is not of a Fairy2i model, or of a format not known here.
    """

    kind: Literal["gguf"] = "gguf"
    quant: QuantConfig | None = None
    makes_codes: bool = True

    def __init__(self, path: Path):
        self.origin, self._file = path, GgufFile(path)
        self._model = read_model(self._file)
        self.trained = QuantConfig(f"w{self._model.stages}", scale="tile64", method="phase")
        self.config: dict[str, Any] = dict(self._model.config)
        self.layers: dict[str, CodedLayer] = {}
        self.tied: dict[str, str] = {}
        self._dense: dict[str, _Dense] = {}
        self._used: set[str] = set()
        self._place()
        unknown = self._file.tensors.keys() - self._used
        if unknown:
            raise ModelFileError(
                f"{path} has the tensor {min(unknown)!r}, which no layer of its "
                f"{self.config['model_type']} model has; it was made by another converter than "
                "the one known here, or is damaged"
            )
        self._tokenizer_note = ""
        self.directory = _temporary_directory(self)
        text = json.dumps(self.config, indent=1)
        (self.directory / "config.json").write_text(text, encoding="utf-8")
        self._bring_tokenizer()

    def _bring_tokenizer(self) -> None:
        beside = self.origin.parent
        if (found := member(beside, "tokenizer.json")) is None:
            tokens = self._file.metadata.get("tokenizer.ggml.tokens", [])
            if isinstance(tokens, list) and len(tokens) > self._padded:
                raise ModelFileError(
                    f"{self.origin} has {len(tokens)} tokens in its vocabulary and "
                    f"{self._padded} rows of its embedding; it is damaged, download it again"
                )
            write_tokenizer(self._file, self.directory)
            if not self.tokenizer_files():
                self._tokenizer_note = (
                    "; it has no tokenizer, and artifacts without one cannot be loaded: put the "
                    "model's tokenizer.json beside the file"
                )
            return
        self._tokenizer_note = f"; its tokenizer is {found}"
        with reading(beside):
            check_fit(self._file, found)
            paths = (member(beside, name) for name in TOKENIZER_FILES)
            texts = {path.name: path.read_bytes() for path in paths if path is not None}
        for name, text in texts.items():
            (self.directory / name).write_bytes(text)
        if member(self.directory, "tokenizer_config.json") is None:
            write_config(self._file, self.directory)

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
            self._plain("output", f"{HEAD}.weight", (vocab, 2 * width), most=self._padded)
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
            biased = any(name.endswith("_proj.bias") for name in self._dense)
            config["attention_bias"] = biased

    def _lacks(self, name: str) -> ModelFileError:
        layout = "bundles" if self._model.bundle else "tile64_v2"
        return ModelFileError(
            f"{self.origin} lacks the layer {name} (in the layout of {layout}, T = "
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
                f"{self.origin}: {name} has the type {info.type} and shape {info.shape}; expected "
                f"float32 (tokens, {width}), pairs of bfloat16"
            )
        self._padded = info.shape[0]
        vocab = self._model.vocab or self._padded
        if vocab > self._padded:
            raise ModelFileError(
                f"{self.origin} has fairy2i.vocab.original_size = {vocab} and {self._padded} rows "
                f"of {name}; allowed: up to as many as there are rows"
            )
        if self._find("output", width) is not None:
            vocab = self._padded  # the rows of a coded head are not those of tokens
        for key in ("bos", "eos"):
            number = self.config.get(f"{key}_token_id", 0)
            if number >= vocab:
                raise ModelFileError(
                    f"{self.origin} has tokenizer.ggml.{key}_token_id = {number}; allowed: one of "
                    f"its {vocab} tokens"
                )
        self.config["vocab_size"] = vocab
        self._used.add(name)
        shape = (vocab, 2 * width)
        self._dense[EMBEDDING] = _Dense(name, shape, "bfloat16", slice(vocab))

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
                f"{self.origin}: {stored} is of ggml's type {info.type}; allowed: {known}"
            )
        padded = (most or shape[0], *shape[1:])
        if tuple(size for size in info.shape if size != 1) != tuple(s for s in padded if s != 1):
            raise ModelFileError(
                f"{self.origin}: {stored} has the shape {info.shape}; expected {padded}"
            )
        self._used.add(stored)
        dtype = FLOATS[info.type].name
        self._dense[ours] = _Dense(stored, shape, dtype, slice(shape[0]))

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
                f"{self.origin}: {name} has {whole.whole} complex rows; its metadata ask for "
                f"{' + '.join(map(str, rows.values()))} of Q, K and V"
            )
        if any(count % TILE for count in rows.values()):
            raise UnsupportedError(
                f"{self.origin}: {name} holds {' + '.join(map(str, rows.values()))} complex rows "
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
                dtype = self._dense[f"{layer}.{ours}.bias"].dtype
                take = np.concatenate([own, whole.whole + own])
                self._dense[f"{layer}.{ours}.bias"] = _Dense(bias, take.shape, dtype, take)
            first += count
        return True

    def names(self) -> list[str]:
        """Return dense tensor names, then ``<layer>.weight`` of every layer with codes."""
        return [*self._dense, *(f"{layer}.weight" for layer in self.layers)]

    def _layer(self, name: str) -> CodedLayer | None:
        layer = name.removesuffix(".weight")
        return self.layers.get(layer) if layer != name else None

    def _stored(self, name: str) -> _Dense:
        if name not in self._dense:
            near = nearest(name, self.names())
            raise FairyError(f"{self.origin} has no tensor {name!r}.{near}")
        return self._dense[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a layer with codes (2n, 2m)."""
        layer = self._layer(name)
        return layer.shape if layer else self._stored(name).shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype; a layer with codes dequantises to ``"float32"``."""
        return "float32" if self._layer(name) else self._stored(name).dtype

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor as stored, checked finite; a layer with codes dequantised."""
        if layer := self._layer(name):
            return read_layer(self._file, layer).dequantize()
        stored = self._stored(name)
        if name == EMBEDDING:
            array = self._read_embedding(stored)
        else:
            flat = self._file.read(stored.tensor)
            array = flat.reshape(-1, *stored.shape[1:])[stored.take]
        check_finite(array, name)
        return array

    def _read_embedding(self, stored: _Dense) -> np.ndarray:
        count, width = stored.shape[0], self._model.width
        array = np.empty((count, 2, width), np.uint16)
        rows = max(1, _CHUNK // (4 * width))  # so that one copy of the table is held, not two
        for first in range(0, count, rows):
            shape = (min(rows, count - first), width, 4)
            raw = self._file.read_bytes(stored.tensor, shape, skip=first * 4 * width)
            array[first : first + rows] = raw.view(np.uint16).transpose(0, 2, 1)
        return array.view(ml_dtypes.bfloat16).reshape(stored.shape)

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Return how the codes were made; layers without any are a choice.

        Raises:
            FairyError: the request is about choosing other codes.
        """
        used = settle_codes(
            self.origin,
            "a GGUF file of a Fairy2i model",
            self.trained,
            self.layers,
            asked,
            calibrated=calibrated,
            by_budget=by_budget,
        )
        note = (
            f"a GGUF file of a Fairy2i model: T = {self._model.stages}, a scale per tile64, in "
            f"{len(self.layers)} layers; others stay dense (--layer-quant LAYER=w3 gives those "
            f"codes, too){self._tokenizer_note}"
        )
        return used, note

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what `phase` would return, or why the layer stays dense."""
        own = LayerPlan(True, self._model.stages, ("U", "W"), "tile64", REASON)
        shape = self.shape(f"{layer}.weight")
        return plan_codes(layer, shape, own if layer in self.layers else None, WITHOUT, quant)

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Return a layer's stored codes; others are quantised as asked."""
        plan = self.plan(layer, quant)
        if not plan.phase:
            raise FairyError(f"{layer} stays dense: {plan.reason}; read it with dense()")
        if layer not in self.layers:
            return quantize_layer(self.dense(f"{layer}.weight"), layer, ordinary(quant))[0]
        return read_layer(self._file, self.layers[layer])

    def tokenizer_files(self) -> list[Path]:
        """Return the tokenizer and chat template files that were found or written."""
        found = (member(self.directory, name) for name in TOKENIZER_FILES)
        return [path for path in found if path is not None]

    def sha256(self) -> dict[str, str]:
        """Return file name -> SHA-256 (hex) of the file and the tokenizer's."""
        paths = {path.name: path for path in self.tokenizer_files()}
        return hash_files({self.origin.name: self.origin, **paths})
