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
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from fairy_compile.artifact.files import hash_files, reading
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError, nearest
from fairy_compile.frontends.files import TOKENIZER_FILES, member
from fairy_compile.frontends.gguf_codes import CodedLayer, read_layer
from fairy_compile.frontends.gguf_config import read_model
from fairy_compile.frontends.gguf_file import GgufFile
from fairy_compile.frontends.gguf_places import EMBEDDING, DensePlace, Places
from fairy_compile.frontends.gguf_tokenizer import check_fit, write_config, write_tokenizer
from fairy_compile.frontends.own_codes import ordinary, plan_codes, settle_codes
from fairy_compile.frontends.plan import LayerPlan, quantize_layer
from fairy_compile.phase import PhaseTensor
from fairy_compile.phase.quantize import check_finite

_CHUNK = 16 << 20
REASON, WITHOUT = "codes stored in the file", "stored dense in the file"


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
        places = Places(self._file, self._model)
        self.config: dict[str, Any] = places.config
        self.layers, self._dense = places.layers, places.dense
        self.tied: dict[str, str] = {}
        self._tokenizer_note = ""
        self.directory = _temporary_directory(self)
        text = json.dumps(self.config, indent=1)
        (self.directory / "config.json").write_text(text, encoding="utf-8")
        self._bring_tokenizer(places.rows)

    def _bring_tokenizer(self, rows: int) -> None:
        beside = self.origin.parent
        if (found := member(beside, "tokenizer.json")) is None:
            tokens = self._file.metadata.get("tokenizer.ggml.tokens", [])
            if isinstance(tokens, list) and len(tokens) > rows:
                raise ModelFileError(
                    f"{self.origin} has {len(tokens)} tokens in its vocabulary and {rows} rows of "
                    "its embedding; it is damaged, download it again"
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

    def names(self) -> list[str]:
        """Return dense tensor names, then ``<layer>.weight`` of every layer with codes."""
        return [*self._dense, *(f"{layer}.weight" for layer in self.layers)]

    def _layer(self, name: str) -> CodedLayer | None:
        layer = name.removesuffix(".weight")
        return self.layers.get(layer) if layer != name else None

    def _stored(self, name: str) -> DensePlace:
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

    def _read_embedding(self, stored: DensePlace) -> np.ndarray:
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
