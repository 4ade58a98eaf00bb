"""Rotating a model before it is quantised: the same function, with weights free of outliers.

A scale for a whole matrix suits weights of one size. Where a few channels of the residual stream
carry much larger weights than the rest, an orthogonal change of basis spreads them over all
channels. With RMSNorm, which has no preferred basis once its gains are multiplied into the layers
behind it, such a change costs nothing when the model runs (QuaRot, arXiv 2404.00456, "stage 1a";
SpinQuant, arXiv 2405.16406, rotations R1 and R2):

- the residual stream h becomes Q h: the embedding's rows, and the outputs of ``o_proj`` and
  ``down_proj``, are multiplied by Q, the inputs of the layers behind the norms by Q^T;
- the values of every head become R v: the rows of ``v_proj`` and the columns of ``o_proj``.

Q and R are Hadamard matrices with random signs where the size is a power of two; for another size
2^k m they are the Kronecker product of a Hadamard matrix of 2^k with a random orthogonal one of m.
The inputs of ``down_proj`` keep their basis, since the product of gate and up is elementwise.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.method import HEAD
from fairy_compile.frontends.plan import (
    LayerPlan,
    plan_weight,
    quantize_layer,
    recover_layer,
)
from fairy_compile.frontends.source import ModelSource
from fairy_compile.phase import PhaseTensor

NOTE = "residual stream and value heads rotated before quantisation"

# Families whose every norm on the residual stream stands before linear layers.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = f"{HEAD}.weight"
_FINAL_NORM = "model.norm.weight"
_LAYER = re.compile(r"(model\.layers\.\d+)\.(\w+)(?:\.(\w+))?\.(weight|bias)")
# Part of a decoder layer -> the norm whose output it reads.
_NORM_BEFORE = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
_READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITERS = ("o_proj", "down_proj")


class Rotation:
    """An orthogonal matrix of a given size that multiplies in O(size log size) where it can.

    Args:
        size: of the vectors.
        seed: of its signs and of its part that is no Hadamard matrix.
    """

    def __init__(self, size: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.rest = size
        while self.rest % 2 == 0:
            self.rest //= 2
        self.power = size // self.rest
        self.signs = random.choice(np.array([-1, 1], np.float32), size)
        q, r = np.linalg.qr(random.standard_normal((self.rest, self.rest)))
        self.part = (q * np.sign(np.diag(r))).astype(np.float32)

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Return the rotated vectors, float32, of the rows of an array (..., size)."""
        shape = vectors.shape
        x = (vectors.astype(np.float32) * self.signs).reshape(-1, self.power, self.rest)
        half = 1
        while half < self.power:
            pairs = x.reshape(len(x), self.power // (2 * half), 2, half, self.rest)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            x = np.stack([first + second, first - second], axis=2)
            half *= 2
        x = x.reshape(-1, self.rest) @ self.part.T
        return (x / np.float32(math.sqrt(self.power))).reshape(shape)


class RotatedSource:
    """A `ModelSource` that gives the weights of another one in rotated bases.

    Layers behind a norm hold its gains, and the gains are 1. An output head that was the embedding
    is a layer of its own. Rotated tensors are float32, the embedding float16 where it was a 16-bit
    one.

    Args:
        source: an ordinary checkpoint.

    Raises:
        UnsupportedError: the family has norms that a rotation does not pass.
        FairyError: the weights are phase codes already, or master weights for them.
    """

    kind: Literal["huggingface"] = "huggingface"
    quant: QuantConfig | None = None
    makes_codes: bool = False

    def __init__(self, source: ModelSource) -> None:
        family = source.config.get("model_type")
        if family not in MODEL_TYPES:
            raise UnsupportedError(
                f"--rotate is not possible for the family {family!r}; allowed: "
                f"{', '.join(MODEL_TYPES)}. Convert it without --rotate"
            )
        if source.kind != "huggingface":
            what = "packed checkpoint" if source.kind == "packed" else "GGUF file of phase codes"
            raise FairyError(
                f"{source.origin} is a {what}, and --rotate is for real weights; leave it out, or "
                "convert the model it was made from with --rotate"
            )
        if reason := getattr(source, "latents", None):
            raise FairyError(
                f"--rotate would undo what these weights were trained for: {reason}; leave it out"
            )
        self._source = source
        self.directory: Path = source.directory
        self.origin: Path = source.origin
        self.config: dict[str, Any] = source.config | {"tie_word_embeddings": False}
        self.tied: dict[str, str] = {}
        hidden = source.shape(_EMBEDDING)[1]
        heads = int(self.config["num_attention_heads"])
        self._head_dim = int(self.config.get("head_dim") or hidden // heads)
        self._stream = Rotation(hidden, seed=0)
        self._values = Rotation(self._head_dim, seed=1)

    def names(self) -> list[str]:
        """Return all tensor names."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._source.shape(name)

    def dtype(self, name: str) -> str:
        """Return the dtype `dense` gives."""
        stored = self._source.dtype(name)
        if name == _EMBEDDING:
            return "float32" if stored == "float32" else "float16"
        return "float32" if self._rotates(name) else stored

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor in the rotated bases."""
        array = self._source.dense(name)
        if name == _EMBEDDING:
            return self._stream.apply(array).astype(self.dtype(name))
        if name == _HEAD:
            return self._read(array, _FINAL_NORM)
        if self._is_folded_norm(name):
            return np.ones_like(array)
        found = _LAYER.fullmatch(name)
        if found is None or not self._rotates(name):
            return array
        layer, part, projection, kind = found.groups()
        if projection in _READERS and kind == "weight":
            array = self._read(array, f"{layer}.{_NORM_BEFORE[part]}.weight")
        if projection == "v_proj":  # rows, or the entries of a bias, are values
            columns = array.reshape(-1, self._head_dim, array.size // array.shape[0])
            return self._values.apply(columns.swapaxes(1, 2)).swapaxes(1, 2).reshape(array.shape)
        if projection == "o_proj" and kind == "weight":
            heads = array.reshape(len(array), -1, self._head_dim)
            array = self._values.apply(heads).reshape(array.shape)
        if projection in _WRITERS:
            return self._stream.apply(array.T).T
        return array

    def _rotates(self, name: str) -> bool:
        """Tell whether a linear layer's tensor is in another basis than the source's."""
        found = _LAYER.fullmatch(name)
        if found is None:
            return name == _HEAD
        projection, kind = found.group(3), found.group(4)
        with_bias = (*_WRITERS, "v_proj")
        return projection in (with_bias if kind == "bias" else _READERS + _WRITERS)

    def _is_folded_norm(self, name: str) -> bool:
        found = _LAYER.fullmatch(name)
        return name == _FINAL_NORM or (
            found is not None and found.group(2) in _NORM_BEFORE.values()
        )

    def _read(self, weight: np.ndarray, norm: str) -> np.ndarray:
        """Return W diag(g) Q^T for a weight W behind a norm of gains g."""
        gains = self._source.dense(norm).astype(np.float32)
        return self._stream.apply(weight.astype(np.float32) * gains)

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Decide the method as for the source; see `ModelSource.settle`."""
        return self._source.settle(asked, calibrated=calibrated, by_budget=by_budget)

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell what becomes of a layer."""
        return plan_weight(layer, self.shape(f"{layer}.weight"), quant)

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Quantise a rotated weight."""
        return quantize_layer(self.dense(f"{layer}.weight"), layer, quant)[0]

    def check_ordinary(self, quant: QuantConfig) -> None:
        """Refuse weights that hold phase values already, which a rotation would lose.

        Raises:
            FairyError: they do, going by the first layer that `plan` makes one of phase codes.
        """
        for name in self._source.names():
            layer = name.removesuffix(".weight")
            if self._rotates(name) and self.plan(layer, quant).phase:
                if recover_layer(self._source.dense(name), layer, quant) is not None:
                    raise FairyError(
                        f"{layer} holds phase values already, and --rotate would lose them; "
                        "leave it out"
                    )
                return

    def tokenizer_files(self) -> list[Path]:
        """Return the files of the source."""
        return self._source.tokenizer_files()

    def sha256(self) -> dict[str, str]:
        """Return the hashes of the source's files."""
        return self._source.sha256()
