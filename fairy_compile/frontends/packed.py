"""The packed checkpoint: phase codes and dense tensors in safetensors, described in config.json.

Files: ``config.json`` (the Hugging Face one plus ``quantization_config``), ``model.safetensors`` or
shards with ``model.safetensors.index.json``, tokenizer files. Tensors:

    <layer>.codes    uint8 (T, terms, n, ceil(m/4))   four 2-bit codes a byte, lowest bits first,
                                                      padding columns 0
    <layer>.scales   float32 or float16 (T, terms, 2, n_tiles, m_tiles)   axis 2 is (re, im)
    <name>           any other tensor, dense, under its Hugging Face name

``quantization_config`` stands in config.json and, as JSON text, in each safetensors header:

    quant_method     "fairy"
    schema_version   1
    codebook         "phase4": codes 0, 1, 2, 3 are the phases 1, i, -1, -i
    config           `QuantConfig.to_json`, what the layers were made with
    layers           layer -> {stages: T, terms, scale, tile: [rows, columns], shape: [2n, 2m]}
    source           {sha256: {file: hex}} of what it was made from

T, terms and granularity may differ per layer. Everything not described here is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fairy_compile.config import GRANULARITIES, MAX_STAGES, Granularity, QuantConfig, Term
from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError
from fairy_compile.frontends.files import ModelDirectory, parse_json_object, tied_tensors
from fairy_compile.frontends.plan import LayerPlan, exempting_pattern
from fairy_compile.frontends.quant_json import read_quant, settle_own
from fairy_compile.frontends.safetensors_file import TensorInfo
from fairy_compile.frontends.store import TensorStore
from fairy_compile.phase import PhaseTensor, tile_shape
from fairy_compile.phase.quantize import check_finite

QUANT_METHOD = "fairy"
SCHEMA_VERSION = 1
CODEBOOK = "phase4"
METADATA_KEY = "quantization_config"

_KEYS = {"quant_method", "schema_version", "codebook", "config", "layers", "source"}
_LAYER_KEYS = {"stages", "terms", "scale", "tile", "shape"}


@dataclass(frozen=True)
class PackedLayer:
    """A phase-coded layer as the table in config.json describes it.

    Attributes:
        stages: T.
        terms: ("U", "W") or ("W",).
        scale: granularity of the scales.
        shape: (2n, 2m), the real map.
    """

    stages: int
    terms: tuple[Term, ...]
    scale: Granularity
    shape: tuple[int, int]

    @classmethod
    def of(cls, tensor: PhaseTensor) -> PackedLayer:
        """Describe a phase tensor."""
        return cls(tensor.stages, tensor.terms, tensor.scale, tensor.shape)

    @property
    def tile(self) -> tuple[int, int]:
        """Complex (rows, columns) that share a pair of scales."""
        return tile_shape(self.scale, self.shape[0] // 2, self.shape[1] // 2)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Shape of ``<layer>.codes``."""
        n, m = self.shape[0] // 2, self.shape[1] // 2
        return self.stages, len(self.terms), n, -(-m // 4)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of ``<layer>.scales``."""
        n, m = self.shape[0] // 2, self.shape[1] // 2
        rows, columns = self.tile
        return self.stages, len(self.terms), 2, -(-n // rows), -(-m // columns)

    def to_json(self) -> dict[str, Any]:
        """Return the table entry."""
        return {
            "stages": self.stages,
            "terms": list(self.terms),
            "scale": self.scale,
            "tile": list(self.tile),
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, name: str, entry: Any) -> PackedLayer:
        """Check and read the table entry of the layer ``name``.

        Raises:
            ModelFileError: a key or value is not one of this schema version.
        """
        if not isinstance(entry, dict) or set(entry) != _LAYER_KEYS:
            keys = sorted(entry) if isinstance(entry, dict) else entry
            raise ModelFileError(
                f"layer {name!r} of the packed checkpoint has the keys {keys!r:.200}; expected "
                f"{sorted(_LAYER_KEYS)}"
            )

        def refuse(key: str, allowed: str) -> ModelFileError:
            return ModelFileError(
                f"layer {name!r} of the packed checkpoint has {key} {entry[key]!r:.80}; "
                f"allowed: {allowed}"
            )

        stages, terms, shape = entry["stages"], entry["terms"], entry["shape"]
        if type(stages) is not int or not 1 <= stages <= MAX_STAGES:
            raise refuse("stages", f"an integer from 1 to {MAX_STAGES}")
        if terms not in (["U", "W"], ["W"]):
            raise refuse("terms", "['U', 'W'] or ['W']")
        if entry["scale"] not in GRANULARITIES:
            raise refuse("scale", ", ".join(GRANULARITIES))
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(type(i) is int and 0 < i < 1 << 31 and i % 2 == 0 for i in shape)
        ):
            raise refuse("shape", "two positive even integers")
        layer = cls(stages, tuple(terms), entry["scale"], (shape[0], shape[1]))
        if entry["tile"] != list(layer.tile):
            raise refuse("tile", f"{list(layer.tile)} for {layer.scale} scales of this shape")
        return layer


def is_packed(config: dict[str, Any]) -> bool:
    """Tell whether a config.json describes a packed checkpoint (of any schema version)."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def quantization_config(
    quant: QuantConfig, layers: dict[str, PackedLayer], source_sha256: dict[str, str]
) -> dict[str, Any]:
    """Return the ``quantization_config`` that describes a packed checkpoint."""
    return {
        "quant_method": QUANT_METHOD,
        "schema_version": SCHEMA_VERSION,
        "codebook": CODEBOOK,
        "config": quant.to_json(),
        "layers": {name: layer.to_json() for name, layer in layers.items()},
        "source": {"sha256": dict(source_sha256)},
    }


class PackedSource(ModelDirectory):
    """A `ModelSource` over a packed checkpoint; see `fairy_compile.frontends.source`.

    Attributes:
        layers: layer name -> `PackedLayer`.

    Raises:
        ModelFileError: files are missing or damaged, or contradict config.json.
        UnsupportedError: schema version, codebook or dtype is unknown.
    """

    kind: Literal["packed"] = "packed"
    makes_codes: bool = True

    def __init__(self, directory: Path, config: dict[str, Any]):
        table = config["quantization_config"]
        version = table.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise UnsupportedError(
                f"{directory} has the packed schema version {version!r}; this version of "
                f"fairy_compile reads {SCHEMA_VERSION}: update it, or convert the model again"
            )
        if set(table) != _KEYS:
            raise ModelFileError(
                f"{directory}: quantization_config has the keys {sorted(table)}; expected "
                f"{sorted(_KEYS)}"
            )
        if table["codebook"] != CODEBOOK:
            raise UnsupportedError(
                f"{directory} has the codebook {table['codebook']!r}; allowed: {CODEBOOK!r}"
            )
        if not isinstance(table["layers"], dict):
            raise ModelFileError(f"{directory}: quantization_config's layers is not an object")
        self.config = config
        self.quant: QuantConfig = read_quant(table["config"], directory)
        self.layers = {
            name: PackedLayer.from_json(name, entry) for name, entry in table["layers"].items()
        }
        self._store = TensorStore.open(directory)
        super().__init__(directory, self._store.files)
        self._check_tensors(table)

    def settle(
        self, asked: QuantConfig, *, calibrated: bool = False, by_budget: bool = False
    ) -> tuple[QuantConfig, str | None]:
        """Return how the checkpoint was made, with the activations and exempt layers asked for."""
        if calibrated or by_budget:
            raise FairyError(
                f"{self.directory} is a packed checkpoint, whose codes are fixed; give the model "
                "it was made from, or leave --calibrate and --bits out"
            )
        return settle_own(self.quant, asked), None

    def _check_tensors(self, table: dict[str, Any]) -> None:
        for path, metadata in self._store.metadata.items():
            text = metadata.get(METADATA_KEY, "{}").encode()
            if parse_json_object(text, f"the header of {path}") != table:
                raise ModelFileError(
                    f"{path} and config.json describe different packed checkpoints; copy the "
                    "directory again"
                )
        coded = set()
        for name, layer in self.layers.items():
            for suffix, dtypes, shape in (
                ("codes", ("uint8",), layer.codes_shape),
                ("scales", ("float32", "float16"), layer.scales_shape),
            ):
                tensor = f"{name}.{suffix}"
                coded.add(tensor)
                self._store.check_dtype(tensor, dtypes)
                if self._store.info(tensor).shape != shape:
                    raise ModelFileError(
                        f"{self.directory}: {tensor!r} has the shape "
                        f"{self._store.info(tensor).shape}; its config.json asks for {shape}"
                    )
            if f"{name}.weight" in self._store.infos:
                raise ModelFileError(
                    f"{self.directory} holds {name!r} both as phase codes and as a dense weight"
                )
        self._dense = [name for name in self._store.infos if name not in coded]
        self.tied = tied_tensors(self.config, [*self._dense, *map("{}.weight".format, self.layers)])
        for name in self._dense:
            self._store.check_dtype(name)

    def names(self) -> list[str]:
        """Return dense tensor names, then ``<layer>.weight`` of every phase-coded layer."""
        return [*self._dense, *(f"{layer}.weight" for layer in self.layers), *self.tied]

    def _coded(self, name: str) -> str | None:
        layer = name.removesuffix(".weight")
        return layer if layer != name and layer in self.layers else None

    def _stored(self, name: str) -> TensorInfo:
        return self._store.info(self.tied.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a phase-coded layer (2n, 2m)."""
        layer = self._coded(name)
        return self.layers[layer].shape if layer else self._stored(name).shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype; a phase-coded layer dequantises to ``"float32"``."""
        return "float32" if self._coded(name) else self._stored(name).dtype

    def dense(self, name: str) -> np.ndarray:
        """Return a tensor as stored, checked finite; a phase-coded layer dequantised."""
        if layer := self._coded(name):
            return self._tensor(layer).dequantize()
        array = self._store.read(self.tied.get(name, name))
        check_finite(array, name)
        return array

    def plan(self, layer: str, quant: QuantConfig) -> LayerPlan:
        """Tell how a layer is stored; ``quant`` can only exempt it."""
        if layer not in self.layers:
            self._stored(f"{layer}.weight")
            return LayerPlan.dense("stored dense in the checkpoint")
        if (pattern := exempting_pattern(layer, quant)) is not None:
            return LayerPlan.dense(f"exempt by pattern {pattern!r}")
        packed = self.layers[layer]
        return LayerPlan(
            True, packed.stages, packed.terms, packed.scale, "codes stored in the checkpoint"
        )

    def phase(self, layer: str, quant: QuantConfig) -> PhaseTensor:
        """Return a layer's stored codes."""
        plan = self.plan(layer, quant)
        if not plan.phase:
            raise FairyError(f"{layer} stays dense: {plan.reason}; read it with dense()")
        return self._tensor(layer)

    def _tensor(self, name: str) -> PhaseTensor:
        layer = self.layers[name]
        n, m = layer.shape[0] // 2, layer.shape[1] // 2
        codes, scales = (self._store.read(f"{name}.{part}") for part in ("codes", "scales"))
        if m % 4 and (codes[..., -1] >> (2 * (m % 4))).any():
            raise ModelFileError(f"{self.directory}: {name!r} has codes in its padding columns")
        try:
            return PhaseTensor(codes, scales, n, m, layer.terms, layer.scale)
        except ModelFileError as error:
            raise ModelFileError(f"{self.directory}: layer {name!r}: {error}") from error


def header_metadata(table: dict[str, Any]) -> dict[str, str]:
    """Return the safetensors ``__metadata__`` of a packed checkpoint."""
    return {"format": "pt", METADATA_KEY: json.dumps(table, separators=(",", ":"))}
