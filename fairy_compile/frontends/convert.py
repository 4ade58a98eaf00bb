"""`convert`: a Hugging Face model becomes a packed checkpoint, one tensor at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fairy_compile.artifact.staging import check_output, staged_directory
from fairy_compile.config import Granularity, QuantConfig, check_choice
from fairy_compile.errors import FairyError
from fairy_compile.frontends.packed import PackedLayer
from fairy_compile.frontends.packed_writer import PackedWriter, layout_bytes, packed_layout
from fairy_compile.frontends.plan import is_linear, quantize_layer
from fairy_compile.frontends.safetensors_writer import tensor_bytes
from fairy_compile.frontends.source import LayerPlan, ModelSource, open_source
from fairy_compile.phase import PhaseTensor

Progress = Callable[[str, int, int], None]  # (tensor about to be done, how many done, how many)

# The error of large layers is measured on every k-th band of rows, this many at most. 64 rows, so
# that a band holds whole tiles of every granularity.
_BAND = 64
_MAX_BANDS = 8


@dataclass(frozen=True)
class LayerReport:
    """What `convert` did with one linear layer.

    Attributes:
        name: layer, without ``.weight``.
        shape: (out_features, in_features).
        phase: True for phase codes, False for dense.
        reason: why.
        stages: T, 0 for dense.
        bits_per_weight: stored bits per real weight, scales included.
        nbytes: stored bytes.
        nmse: squared error of the dequantised weight relative to the weight's squared norm, over
            up to 512 complex rows; None for dense layers and dry runs.
    """

    name: str
    shape: tuple[int, ...]
    phase: bool
    reason: str
    stages: int
    bits_per_weight: float
    nbytes: int
    nmse: float | None = None


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` wrote, or with ``dry_run`` would write.

    Attributes:
        output: the packed checkpoint.
        layers: one entry a linear layer.
        bits_per_weight: mean over the weights of all linear layers, dense ones included.
        nbytes: bytes of all tensors, embeddings and norms included.
        seconds: wall-clock time.
        files: names of the files written; empty for a dry run.
        dry_run: True if nothing was written.
        note: the method used, and why.
    """

    output: Path
    layers: list[LayerReport]
    bits_per_weight: float
    nbytes: int
    seconds: float
    files: list[str]
    dry_run: bool
    note: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self) | {"output": str(self.output)}


def convert(
    model: str | Path,
    output: str | Path,
    *,
    quant: QuantConfig | str = "w2",
    scale: Granularity | None = None,
    force: bool = False,
    dry_run: bool = False,
    dense_dtype: Literal["float16"] | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> ConvertReport:
    """Write the packed checkpoint of a Hugging Face model.

    Linear layers become phase codes, every other tensor is copied; memory stays within a few
    times the largest tensor. The output appears complete or not at all.

    Args:
        model: directory or hub id.
        output: directory to make.
        quant: ``"w1"`` .. ``"w4"`` or a whole `QuantConfig`.
        scale: granularity of the scales; overrides the config's.
        force: replace an existing checkpoint.
        dry_run: plan and report, write nothing and read no weights.
        dense_dtype: store dense tensors as float16; None keeps their dtypes.
        progress: called before every tensor.
        revision: branch, tag or commit of a hub model.

    Raises:
        FairyError: ``model`` is packed already, an option is unknown, the output is not empty, the
            disk is too full, or a weight is not finite.
        ModelFileError: the model is missing files or damaged.
    """
    started = time.monotonic()
    config = quant if isinstance(quant, QuantConfig) else QuantConfig(quant)
    if scale is not None:
        config = dataclasses.replace(config, scale=scale)
    if dense_dtype is not None:
        check_choice("dense dtype", dense_dtype, ["float16"])
    source = open_source(model, revision=revision)
    if source.kind == "packed":
        raise FairyError(
            f"{source.directory} is a packed checkpoint already; give it to `fairy_compile build`, "
            "or convert the model it was made from"
        )
    config, note = source.settle(config)
    plans = {
        name.removesuffix(".weight"): source.plan(name.removesuffix(".weight"), config)
        for name in source.names()
        if is_linear(name, source.shape(name))
    }
    layers = {
        name: PackedLayer(plan.stages, plan.terms, plan.scale, source.shape(f"{name}.weight"))
        for name, plan in plans.items()
        if plan.phase
    }
    dense = {
        name: (dense_dtype or source.dtype(name), source.shape(name))
        for name in source.names()
        if name.removesuffix(".weight") not in layers and name not in source.tied
    }
    nbytes = layout_bytes(packed_layout(layers, dense))
    measured: dict[str, tuple[str, float]] = {}
    files: list[str] = []
    check_output(output, force=force, needed_bytes=nbytes)
    if not dry_run:
        with staged_directory(output, force=force, needed_bytes=nbytes) as staging:
            with PackedWriter(
                staging,
                source.config,
                quant=config,
                layers=layers,
                dense=dense,
                tokenizer_files=source.tokenizer_files(),
                source_sha256=source.sha256(),
            ) as writer:
                _write_tensors(source, writer, config, layers, dense, measured, progress)
            files = sorted(path.name for path in staging.iterdir())
    reports = [
        _report(name, source, plan, layers.get(name), dense, measured.get(name))
        for name, plan in plans.items()
    ]
    weights = sum(layer.shape[0] * layer.shape[1] for layer in reports)
    return ConvertReport(
        Path(output),
        reports,
        sum(8 * layer.nbytes for layer in reports) / max(weights, 1),
        nbytes,
        time.monotonic() - started,
        files,
        dry_run,
        note,
    )


def _write_tensors(
    source: ModelSource,
    writer: PackedWriter,
    config: QuantConfig,
    layers: dict[str, PackedLayer],
    dense: dict[str, tuple[str, tuple[int, ...]]],
    measured: dict[str, tuple[str, float]],
    progress: Progress | None,
) -> None:
    """Write every tensor, noting how each phase layer was made and its error."""
    names = [n for n in source.names() if n in dense or n.removesuffix(".weight") in layers]
    for done, name in enumerate(names):
        if progress is not None:
            progress(name, done, len(names))
        array = source.dense(name)
        layer = name.removesuffix(".weight")
        if layer in layers:
            tensor, reason = quantize_layer(array, layer, config)
            measured[layer] = reason, relative_error(array, tensor)
            writer.add_layer(layer, tensor)
        else:
            writer.add_dense(name, _cast(array, dense[name][0], name))


def _cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    if array.dtype.name == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise FairyError(
            f"{name} goes up to {float(np.abs(array).max()):.4g}, which {dtype} cannot hold; "
            "convert without a dense dtype"
        )
    return cast


def relative_error(weight: np.ndarray, tensor: PhaseTensor) -> float:
    """Return ||A - A'||² / ||A||² of a weight A and its phase tensor A'.

    Computed on evenly spaced bands of 64 complex rows, 512 at most: all rows of small layers.

    Args:
        weight: (2n, 2m), any float dtype.
        tensor: phase tensor of the same shape.
    """
    starts = range(0, tensor.n, _BAND)
    lost = total = 0.0
    for first in starts[:: -(-len(starts) // _MAX_BANDS)]:
        rows = np.arange(first, min(first + _BAND, tensor.n))
        scales = tensor.scales
        if tensor.scale == "row":
            scales = scales[..., rows, :]
        elif tensor.scale == "tile64":
            scales = scales[..., first // _BAND : first // _BAND + 1, :]
        band = dataclasses.replace(
            tensor, codes=tensor.codes[:, :, rows], scales=scales, n=len(rows)
        )
        exact = weight[np.concatenate([rows, tensor.n + rows])].astype(np.float32)
        lost += float(np.square(exact - band.dequantize()).sum(dtype=np.float64))
        total += float(np.square(exact).sum(dtype=np.float64))
    return lost / total if total else 0.0


def _report(
    name: str,
    source: ModelSource,
    plan: LayerPlan,
    layer: PackedLayer | None,
    dense: dict[str, tuple[str, tuple[int, ...]]],
    measured: tuple[str, float] | None,
) -> LayerReport:
    shape = source.shape(f"{name}.weight")
    if layer is None:
        stored = dense.get(f"{name}.weight")  # a tied weight is stored as another tensor
        nbytes = tensor_bytes(*stored) if stored else 0
    else:
        nbytes = layout_bytes(packed_layout({name: layer}, {}))
    bits = 8 * nbytes / max(shape[0] * shape[1], 1)
    reason, nmse = measured or (plan.reason, None)
    return LayerReport(name, shape, plan.phase, reason, plan.stages, bits, nbytes, nmse)
