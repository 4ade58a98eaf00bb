"""`TensorStore`: the tensors of a model directory by name, over one file or many shards."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError, nearest
from fairy_compile.frontends.files import (
    INDEX_LIMIT,
    member,
    plain_file_name,
    read_json_object,
)
from fairy_compile.frontends.safetensors_file import SafetensorsFile, TensorInfo
from fairy_compile.frontends.torch_file import TorchFile

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
FLOATS = ("float32", "float16", "bfloat16")


class TensorFile(Protocol):
    """A file of named tensors, read one at a time."""

    path: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Return a copy of one tensor."""


class TensorStore:
    """Where each tensor of a directory lies.

    Attributes:
        files: index (where there is one) and weight files.
        infos: name -> `TensorInfo`.
        metadata: safetensors ``__metadata__`` of each weight file ({} for ``.bin``).
    """

    def __init__(self, files: list[Path], locations: dict[str, TensorFile]):
        self.files = files
        self._locations = locations
        self.infos = {name: file.tensors[name] for name, file in locations.items()}
        weights = {file.path: file for file in locations.values()}
        self.metadata: dict[Path, dict[str, str]] = {
            path: getattr(file, "metadata", {}) for path, file in weights.items()
        }

    @classmethod
    def open(cls, directory: Path) -> TensorStore:
        """Open ``model.safetensors`` or its shards, else ``pytorch_model.bin`` or its shards.

        Raises:
            ModelFileError: there is neither, or what is there is damaged or incomplete.
        """
        kinds: list[tuple[str, type]] = [(SAFETENSORS, SafetensorsFile), (TORCH, TorchFile)]
        for name, kind in kinds:
            path = member(directory, name)
            if path is not None:
                file = kind(path)
                return cls([path], dict.fromkeys(file.tensors, file))
            index = member(directory, f"{name}.index.json")
            if index is not None:
                return cls._open_shards(directory, index, kind)
        raise ModelFileError(
            f"{directory} has no weights: looked for {SAFETENSORS}, {SAFETENSORS}.index.json, "
            f"{TORCH} and {TORCH}.index.json"
        )

    @classmethod
    def _open_shards(cls, directory: Path, index: Path, kind: type) -> TensorStore:
        shards: dict[str, TensorFile] = {}
        locations: dict[str, TensorFile] = {}
        weight_map = read_weight_map(index)
        for name in dict.fromkeys(weight_map.values()):
            path = member(directory, name)
            if path is None:
                raise ModelFileError(
                    f"{directory} lacks the shard {name} that {index.name} lists; download it"
                )
            shards[name] = kind(path)
        for tensor, shard in weight_map.items():
            if tensor not in shards[shard].tensors:
                raise ModelFileError(
                    f"{directory / shard} lacks the tensor {tensor!r} that {index.name} places in "
                    "it; index and shards do not belong together, download them again"
                )
            locations[tensor] = shards[shard]
        return cls([index, *(shard.path for shard in shards.values())], locations)

    def info(self, name: str) -> TensorInfo:
        """Return dtype and shape of a tensor.

        Raises:
            FairyError: there is no such tensor.
        """
        if name not in self.infos:
            raise FairyError(
                f"{self.files[-1].parent} has no tensor {name!r}.{nearest(name, list(self.infos))}"
            )
        return self.infos[name]

    def read(self, name: str) -> np.ndarray:
        """Return a copy of a tensor in its stored dtype."""
        self.info(name)
        return self._locations[name].read(name)

    def check_dtype(self, name: str, allowed: Collection[str] = FLOATS) -> None:
        """Raise `UnsupportedError` unless the tensor's dtype is one of ``allowed``."""
        if self.info(name).dtype not in allowed:
            raise UnsupportedError(
                f"{self._locations[name].path}: tensor {name!r} is {self.infos[name].dtype}; "
                f"allowed: {', '.join(allowed)}"
            )


def read_weight_map(index: Path) -> dict[str, str]:
    """Read tensor name -> shard file name from a shard index.

    Raises:
        ModelFileError: it is not such an index, or names a file with a folder part.
    """
    weight_map = read_json_object(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index} has no weight_map of tensor names to shard files")
    return {tensor: plain_file_name(shard, index) for tensor, shard in weight_map.items()}
