"""Writing packed checkpoints: streaming for `convert`, in one call for models held in memory."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fairy_compile.artifact.staging import staged_directory
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends.files import CONFIG_LIMIT
from fairy_compile.frontends.packed import PackedLayer, header_metadata, quantization_config
from fairy_compile.frontends.safetensors_writer import SafetensorsWriter, tensor_bytes
from fairy_compile.frontends.store import SAFETENSORS
from fairy_compile.phase import PhaseTensor

SHARD_BYTES = 4 << 30

Layout = dict[str, tuple[str, tuple[int, ...]]]


def packed_layout(
    layers: Mapping[str, PackedLayer],
    dense: Mapping[str, tuple[str, tuple[int, ...]]],
    scale_dtype: str = "float32",
) -> Layout:
    """Return stored tensor name -> (dtype, shape) of a packed checkpoint."""
    layout: Layout = {}
    for name, layer in layers.items():
        layout[f"{name}.codes"] = ("uint8", layer.codes_shape)
        layout[f"{name}.scales"] = (scale_dtype, layer.scales_shape)
    return layout | dict(dense)


def layout_bytes(layout: Layout) -> int:
    """Return the size of all tensors of a layout."""
    return sum(tensor_bytes(*entry) for entry in layout.values())


class PackedWriter:
    """Writes a packed checkpoint tensor by tensor into an existing empty directory.

    Use it inside `staged_directory`, so that an interrupted run leaves nothing behind.

    Args:
        directory: where the files go.
        config: the model's config.json, without ``quantization_config``.
        quant: what the layers were made with.
        layers: every phase-coded layer.
        dense: every dense tensor, name -> (dtype, shape).
        tokenizer_files: files to copy beside the weights.
        source_sha256: file -> SHA-256 of what the checkpoint was made from.
        scale_dtype: ``"float32"`` or ``"float16"``, that of every layer's scales.
        shard_bytes: a file is closed before it would hold more than this.

    Raises:
        ModelFileError: the description of the layers does not fit into config.json.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        *,
        quant: QuantConfig,
        layers: Mapping[str, PackedLayer],
        dense: Mapping[str, tuple[str, tuple[int, ...]]],
        tokenizer_files: Iterable[Path] = (),
        source_sha256: Mapping[str, str] | None = None,
        scale_dtype: str = "float32",
        shard_bytes: int = SHARD_BYTES,
    ):
        self.directory = directory
        table = quantization_config(quant, dict(layers), dict(source_sha256 or {}))
        text = json.dumps(dict(config) | {"quantization_config": table}, indent=1) + "\n"
        if len(text.encode()) > CONFIG_LIMIT:
            raise ModelFileError(
                f"config.json with {len(layers)} layers would be {len(text.encode())} bytes; "
                f"allowed: {CONFIG_LIMIT}"
            )
        (directory / "config.json").write_text(text, encoding="utf-8")
        for file in tokenizer_files:
            shutil.copyfile(file, directory / file.name)
        layout = packed_layout(layers, dense, scale_dtype)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = contextlib.ExitStack()
        shards = _split(layout, shard_bytes)
        for file_name, tensors in shards.items():
            writer = SafetensorsWriter(directory / file_name, tensors, header_metadata(table))
            self._stack.enter_context(writer)
            self._writers |= dict.fromkeys(tensors, writer)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": layout_bytes(layout)},
                "weight_map": {name: w.path.name for name, w in self._writers.items()},
            }
            path = directory / f"{SAFETENSORS}.index.json"
            path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def add_layer(self, name: str, tensor: PhaseTensor) -> None:
        """Write a phase-coded layer."""
        self._add(f"{name}.codes", tensor.codes)
        self._add(f"{name}.scales", tensor.scales)

    def add_dense(self, name: str, array: np.ndarray) -> None:
        """Write a dense tensor."""
        self._add(name, array)

    def _add(self, name: str, array: np.ndarray) -> None:
        if name not in self._writers:
            raise ValueError(f"{name} was not announced")
        self._writers[name].add(name, array)

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, t)


def _split(layout: Layout, shard_bytes: int) -> dict[str, Layout]:
    """Deal tensors out to files in order; one tensor never spans two."""
    shards: list[Layout] = [{}]
    size = 0
    for name, entry in layout.items():
        nbytes = tensor_bytes(*entry)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += nbytes
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def write_packed(
    directory: str | Path,
    config: Mapping[str, Any],
    layers: Mapping[str, PhaseTensor],
    dense: Mapping[str, np.ndarray],
    *,
    quant: QuantConfig,
    tokenizer_files: Iterable[Path] = (),
    source_sha256: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Write a packed checkpoint of a model held in memory.

    Args:
        directory: the checkpoint to make.
        config: the model's config.json, without ``quantization_config``.
        layers: layer name (without ``.weight``) -> `PhaseTensor`; all with scales of one dtype.
        dense: tensor name -> float32, float16 or bfloat16 array.
        quant: what the layers were made with.
        tokenizer_files: files to copy beside the weights.
        source_sha256: file -> SHA-256 of what the checkpoint was made from.
        force: replace an existing directory.

    Raises:
        FairyError: the directory exists and ``force`` is False, the disk is too full, or the
            scales have several dtypes.
    """
    dtypes = {tensor.scales.dtype.name for tensor in layers.values()} or {"float32"}
    if len(dtypes) > 1:
        raise FairyError(
            f"the layers have scales of {sorted(dtypes)}; give all of them one dtype with "
            "PhaseTensor.with_scale_dtype"
        )
    scale_dtype = dtypes.pop()
    table = {name: PackedLayer.of(tensor) for name, tensor in layers.items()}
    shapes = {name: (array.dtype.name, array.shape) for name, array in dense.items()}
    layout = packed_layout(table, shapes, scale_dtype)
    with (
        staged_directory(directory, force=force, needed_bytes=layout_bytes(layout)) as staging,
        PackedWriter(
            staging,
            config,
            quant=quant,
            layers=table,
            dense=shapes,
            tokenizer_files=tokenizer_files,
            source_sha256=source_sha256,
            scale_dtype=scale_dtype,
        ) as writer,
    ):
        for name, tensor in layers.items():
            writer.add_layer(name, tensor)
        for name, array in dense.items():
            writer.add_dense(name, array)
