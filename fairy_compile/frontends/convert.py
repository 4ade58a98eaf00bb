"""`convert`: a Hugging Face model becomes a packed checkpoint, one tensor at a time."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from fairy_compile.artifact.schema import dump_json, load_object
from fairy_compile.artifact.staging import check_apart, check_output, staged_directory
from fairy_compile.config import MAX_STAGES, Granularity, QuantConfig, check_choice
from fairy_compile.errors import FairyError
from fairy_compile.frontends.budget import check_budget, make_groups
from fairy_compile.frontends.maker import (
    Calibrated,
    Direct,
    Made,
    Maker,
    Progress,
    phase_plans,
    relative_error,
)
from fairy_compile.frontends.packed import PackedLayer
from fairy_compile.frontends.packed_writer import PackedWriter, layout_bytes, packed_layout
from fairy_compile.frontends.plan import unmatched_notes
from fairy_compile.frontends.rotate import NOTE, RotatedSource
from fairy_compile.frontends.safetensors_writer import tensor_bytes
from fairy_compile.frontends.source import LayerPlan, ModelSource, open_source
from fairy_compile.paths import as_path

if TYPE_CHECKING:
    from fairy_compile.calibrate import Calibration

__all__ = ["ConvertReport", "LayerReport", "Progress", "convert", "relative_error"]

Dense = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype, shape)

# Unfinished calibration, inside the directory that is being written.
_WORK = ".calibration"
# Beside the weights of a calibrated checkpoint: its report, and what it was made of.
CALIBRATION_FILE = "calibration.json"


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
            up to 512 complex rows without calibration; None for dense layers and dry runs.
        output_error: squared error of the layer's outputs on the calibration inputs relative to
            their square; None without calibration.
        loss: estimate of what the layer adds to the loss, nats a token; None unless T was chosen
            under a budget with calibration.
    """

    name: str
    shape: tuple[int, ...]
    phase: bool
    reason: str
    stages: int
    bits_per_weight: float
    nbytes: int
    nmse: float | None = None
    output_error: float | None = None
    loss: float | None = None


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
        notes: the method used and why, what was calibrated on, and the like.
    """

    output: Path
    layers: list[LayerReport]
    bits_per_weight: float
    nbytes: int
    seconds: float
    files: list[str]
    dry_run: bool
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self) | {"output": str(self.output)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ConvertReport:
        """Undo `to_json`."""
        layers = [
            LayerReport(**entry | {"shape": tuple(entry["shape"])}) for entry in value["layers"]
        ]
        return cls(**value | {"output": Path(value["output"]), "layers": layers})


def convert(
    model: str | Path,
    output: str | Path,
    *,
    quant: QuantConfig | str = "w2",
    scale: Granularity | None = None,
    calibrate: Calibration | str | Path | None = None,
    bits: float | None = None,
    rotate: bool = False,
    force: bool = False,
    dry_run: bool = False,
    dense_dtype: Literal["float16"] | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    reuse: bool = False,
) -> ConvertReport:
    """Write the packed checkpoint of a Hugging Face model.

    Linear layers become phase codes, every other tensor is copied; memory stays within a few
    times the largest tensor, with calibration text a few times the largest decoder layer. The
    output appears complete or not at all. A calibration that was interrupted goes on when the
    same call is made again.

    Args:
        model: directory or hub id.
        output: directory to make.
        quant: ``"w1"`` .. ``"w4"`` or a whole `QuantConfig`.
        scale: granularity of the scales; overrides the config's.
        calibrate: text to calibrate on, or a `Calibration`; needs the extra ``train``.
        bits: mean bits a weight, scales included, under which T is chosen for every layer that
            ``quant.stages_for`` does not name; takes the place of ``quant.quant``.
        rotate: change the bases of the residual stream and of the value heads first, which spreads
            outliers over all channels; see `frontends.rotate`.
        force: replace an existing checkpoint.
        dry_run: plan and report, write nothing and read no weights.
        dense_dtype: store dense tensors as float16; None keeps their dtypes.
        progress: called before every tensor.
        revision: branch, tag or commit of a hub model.
        reuse: where ``output`` already is what this call would calibrate, leave it and return
            its report.

    Raises:
        FairyError: ``model`` is packed already, an option is unknown or does not go with another,
            the output is not empty, the disk is too full, a weight is not finite, or the
            calibration text cannot be used.
        ModelFileError: the model is missing files or damaged.
    """
    started = time.monotonic()
    output = as_path("the output", output)
    config = quant if isinstance(quant, QuantConfig) else QuantConfig(quant)
    if scale is not None:
        config = dataclasses.replace(config, scale=scale)
    if dense_dtype is not None:
        check_choice("dense dtype", dense_dtype, ["float16"])
    if bits is not None and dry_run:
        refuse_dry_run()
    source = open_source(model, revision=revision)
    if source.kind == "packed":
        raise FairyError(
            f"{source.directory} is a packed checkpoint already; give it to `fairy_compile build`, "
            "or convert the model it was made from"
        )
    if rotate:
        source = RotatedSource(source)
    check_output(output, force=force)
    check_apart(output, source.origin)
    asked = config
    config, note = source.settle(
        asked, calibrated=calibrate is not None, by_budget=bits is not None
    )
    notes = [note] if note else []
    notes += unmatched_notes(asked, phase_plans(source, config))
    if isinstance(source, RotatedSource):
        notes.append(NOTE)
        if not dry_run:
            source.check_ordinary(config)
    if bits is not None:
        _check_bits(source, config, bits)
    maker: Maker = Direct(source, config, bits)
    key, work_bytes = None, 0
    if calibrate is not None:
        maker, key, work_bytes = _calibrated(source, config, bits, calibrate, notes, dry_run)
    if reuse and key and (before := _finished(output, key)):
        return before
    most = dataclasses.replace(config, quant=f"w{MAX_STAGES}") if bits is not None else config
    plan = _Plan(source, most, dense_dtype)
    check_output(output, force=force, needed_bytes=plan.nbytes + work_bytes)
    made: dict[str, Made] = {}
    files: list[str] = []

    def report() -> ConvertReport:
        layers = [_report(name, source, plan, made.get(name)) for name in plan.linears]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        bits = sum(8 * layer.nbytes for layer in layers) / max(weights, 1)
        seconds = time.monotonic() - started
        return ConvertReport(output, layers, bits, plan.nbytes, seconds, files, dry_run, notes)

    if not dry_run:
        needed = plan.nbytes + work_bytes
        staged = staged_directory(output, force=force, needed_bytes=needed, resume_key=key)
        with staged as staging:
            work = staging / _WORK
            config = maker.prepare(work, progress)
            notes += maker.notes
            plan = _Plan(source, config, dense_dtype)
            _write(source, staging, config, plan, maker, made, progress)
            shutil.rmtree(work, ignore_errors=True)
            files = [path.name for path in staging.iterdir()]
            if key is not None:
                notes.append(_peak_note())
                files = sorted({*files, CALIBRATION_FILE})
                facts = {"key": key, "report": report().to_json()}
                dump_json(staging / CALIBRATION_FILE, facts)
            files.sort()
    return report()


def _finished(output: Path, key: str) -> ConvertReport | None:
    """Return the report of a calibrated checkpoint made with the same key, if there is one."""
    path = output / CALIBRATION_FILE
    if not path.is_file():
        return None
    before = load_object(path)
    return ConvertReport.from_json(before["report"]) if before.get("key") == key else None


def refuse_dry_run() -> NoReturn:
    """Raise `FairyError`: a budget of bits and a dry run do not go together."""
    raise FairyError(
        "a dry run reads no weights and cannot tell what --bits would choose; leave one of the "
        "two out"
    )


class _Plan:
    """What the checkpoint will hold.

    Attributes:
        linears: layer -> plan.
        layers: those that become phase codes.
        dense: the other tensors.
        nbytes: of all.
    """

    def __init__(self, source: ModelSource, quant: QuantConfig, dense_dtype: str | None) -> None:
        self.linears: dict[str, LayerPlan] = phase_plans(source, quant)
        self.layers = {
            name: PackedLayer(plan.stages, plan.terms, plan.scale, source.shape(f"{name}.weight"))
            for name, plan in self.linears.items()
            if plan.phase
        }
        self.dense: Dense = {
            name: (dense_dtype or source.dtype(name), source.shape(name))
            for name in source.names()
            if name.removesuffix(".weight") not in self.layers and name not in source.tied
        }
        self.nbytes = layout_bytes(packed_layout(self.layers, self.dense))


def _check_bits(source: ModelSource, quant: QuantConfig, bits: float) -> None:
    """Refuse a budget that cannot be met before weights are read."""
    shapes, errors = {}, {}
    for layer, plan in phase_plans(source, quant).items():
        if plan.phase:
            shapes[layer] = source.shape(f"{layer}.weight")
            pinned = quant.names_stages(layer)
            errors[layer] = dict.fromkeys([plan.stages] if pinned else range(1, MAX_STAGES + 1), 0)
    check_budget(make_groups(shapes, errors, quant.scale), bits)


def _calibrated(
    source: ModelSource,
    quant: QuantConfig,
    bits: float | None,
    calibrate: Calibration | str | Path,
    notes: list[str],
    dry_run: bool,
) -> tuple[Maker, str | None, int]:
    """Return the maker of a calibrated conversion, its resume key and bytes of temporary files."""
    from fairy_compile.calibrate import Calibration, check_packages

    check_packages()
    from fairy_compile.calibrate.windows import read_windows

    if not isinstance(calibrate, Calibration):
        calibrate = Calibration(str(calibrate))
    windows = read_windows(source.directory, calibrate)
    maker = Calibrated(source, quant, bits, calibrate, windows)
    if dry_run:
        return maker, None, 0
    from fairy_compile.calibrate import run

    by_budget = bits is not None
    notes.append(
        f"calibrated on {windows.size:,} tokens of {calibrate.text}, in {len(windows)} windows of "
        f"{windows.shape[1]}, on {run.device()}"
    )
    widest = max((p.shape[1] for p in _Plan(source, quant, None).layers.values()), default=0)
    if windows.size < widest:
        notes.append(
            f"{windows.size:,} tokens are few for layers with up to {widest:,} inputs: codes will "
            "be fitted to this text more than to the model's use; give more text"
        )
    if calibrate.tune:
        from fairy_compile.calibrate.tune import check_memory

        check_memory(source)
    key = run.resume_key(source, quant, windows, by_budget=by_budget, tune=calibrate.tune)
    return maker, key, run.work_bytes(source, windows, by_budget=by_budget)


def _peak_note() -> str:
    from fairy_compile.artifact.files import human_bytes
    from fairy_compile.bench.machine import peak_resident_bytes

    peak = peak_resident_bytes()
    return "peak memory unknown" if peak is None else f"peak memory {human_bytes(peak)}"


def _write(
    source: ModelSource,
    directory: Path,
    quant: QuantConfig,
    plan: _Plan,
    maker: Maker,
    made: dict[str, Made],
    progress: Progress | None,
) -> None:
    """Write every tensor, noting how each phase layer was made and its error."""
    names = [
        n for n in source.names() if n in plan.dense or n.removesuffix(".weight") in plan.layers
    ]
    with PackedWriter(
        directory,
        source.config,
        quant=quant,
        layers=plan.layers,
        dense=plan.dense,
        tokenizer_files=source.tokenizer_files(),
        source_sha256=source.sha256(),
    ) as writer:
        for done, name in enumerate(names):
            if progress is not None:
                progress(name, done, len(names))
            array = source.dense(name)
            layer = name.removesuffix(".weight")
            if layer in plan.layers:
                tensor, made[layer] = maker.make(layer, array)
                writer.add_layer(layer, tensor)
            else:
                writer.add_dense(name, _cast(maker.dense(name, array), plan.dense[name][0], name))


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


def _report(name: str, source: ModelSource, plan: _Plan, made: Made | None) -> LayerReport:
    shape, layer, own = source.shape(f"{name}.weight"), plan.layers.get(name), plan.linears[name]
    if layer is None:
        stored = plan.dense.get(f"{name}.weight")  # a tied weight is stored as another tensor
        nbytes = tensor_bytes(*stored) if stored else 0
    else:
        nbytes = layout_bytes(packed_layout({name: layer}, {}))
    bits = 8 * nbytes / max(shape[0] * shape[1], 1)
    report = LayerReport(name, shape, own.phase, own.reason, own.stages, bits, nbytes)
    if made is None:
        return report
    return dataclasses.replace(
        report,
        reason=made.reason,
        nmse=made.nmse,
        output_error=made.output_error,
        loss=made.loss,
    )
