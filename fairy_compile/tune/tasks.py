"""Tasks: the distinct kernel calls of a model, each with a batch class, as work for the tuner."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fairy_compile.artifact.manifest import MANIFEST, Manifest
from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError
from fairy_compile.kernels import FAMILIES
from fairy_compile.kernels.base import Batch, PhaseKernel, cost
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.paths import as_path
from fairy_compile.targets import Target, activation_dtype

TUNED_BATCHES: tuple[Batch, ...] = ("single", "many")
"""Batch class ``decode`` takes the knobs of these."""

DEFAULT_ROWS = (4, 128)
"""Rows of x that stand for batch ``many``: a small decode batch and a piece of a prompt."""


@dataclass(frozen=True)
class Task:
    """One function to tune.

    Attributes:
        kernel_name: see `PhaseKernel.name`.
        spec: the call.
        batch: batch class of the function.
        rows: rows of x to time it with; ``(1,)`` for batch ``single``.
        demands: knobs that the layers' weights fix.
        calls: how often a pass through the model makes the call.
    """

    kernel_name: str
    spec: PhaseSpec
    batch: Batch
    rows: tuple[int, ...]
    demands: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 1

    @cached_property
    def kernel(self) -> PhaseKernel:
        """The kernel itself."""
        return kernel_named(self.kernel_name)

    @property
    def text(self) -> str:
        """The call as records name it."""
        return self.spec.describe()

    @property
    def key(self) -> str:
        """What tells the task from others, in one line."""
        fixed = "".join(f" {k}={v}" for k, v in sorted(self.demands.items()))
        rows = ",".join(map(str, self.rows))
        return f"{self.kernel_name} {self.text} {self.batch} b={rows}{fixed}"

    @property
    def id(self) -> str:
        """A short name for files, the same in every run."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:12]

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights that a call reads."""
        return cost(self.kernel, self.spec, 1).weight_bytes

    def operations(self, rows: int) -> int:
        """Return multiplies and adds of the real map for so many rows of x."""
        return cost(self.kernel, self.spec, rows).operations


def kernel_named(name: str) -> PhaseKernel:
    """Return the kernel called ``name``.

    Raises:
        FairyError: there is none.
    """
    for family in FAMILIES.values():
        for kernel in family:
            if kernel.name == name:
                return kernel
    raise FairyError(
        f"there is no kernel {name!r} in this version; build the artifact again, or tune the "
        "model it was built from"
    )


def tasks_of(
    model: str | Path,
    target: Target,
    quant: QuantConfig | None = None,
    rows: Sequence[int] = DEFAULT_ROWS,
) -> list[Task]:
    """Return the tasks of a model or artifact, those that take most of a pass first.

    Args:
        model: an artifact, whose weights' demands are known, or what `frontends.open_source` takes.
        target: what it is compiled for; an artifact has to be one for it.
        quant: how a model becomes codes, default `QuantConfig()`; not for an artifact, which knows.
            Of a checkpoint that brings its codes only activations and exempt layers are a choice.
        rows: of x for batch ``many``.

    Raises:
        FairyError: it is neither, holds no call of a kernel with knobs, is an artifact with
            ``quant`` given, or has other codes than ``quant`` asks for.
    """
    place = as_path("the model", model)
    if (place / MANIFEST).is_file():
        if quant is not None:
            raise FairyError(
                f"{model} is an artifact, whose codes and activations are as it was built; leave "
                "out --quant, --scale, --layer-quant, --act and --exempt, or give the model it was "
                "built from"
            )
        calls = _calls_of_artifact(place, target)
    else:
        calls = _calls_of_model(model, target, quant or QuantConfig())
    tasks = collect(calls, rows)
    if not tasks:
        raise FairyError(
            f"{model} has no call of a kernel with knobs on target {target.name}: there is "
            "nothing to tune"
        )
    return tasks


Call = tuple[PhaseKernel, PhaseSpec, Mapping[str, Any]]


def collect(calls: Iterable[Call], rows: Sequence[int]) -> list[Task]:
    """Return the distinct tasks of ``calls``, counted, largest first."""
    found: Counter[tuple[str, str, Batch, tuple[tuple[str, Any], ...]]] = Counter()
    tasks: dict[Any, Task] = {}
    for kernel, spec, demands in calls:
        if not kernel.knobs:
            continue
        for batch in TUNED_BATCHES:
            fixed = tuple(sorted(demands.items()))
            key = (kernel.name, spec.describe(), batch, fixed)
            found[key] += 1
            timed = (1,) if batch == "single" else tuple(rows)
            tasks.setdefault(key, Task(kernel.name, spec, batch, timed, dict(fixed)))
    counted = [replace(task, calls=found[key]) for key, task in tasks.items()]
    return sorted(counted, key=lambda t: (-t.calls * t.operations(1), t.text, t.batch != "single"))


def _calls_of_model(model: str | Path, target: Target, quant: QuantConfig) -> list[Call]:
    from fairy_compile.compiler.plan import Planner
    from fairy_compile.frontends.source import open_source
    from fairy_compile.models import network_of, parse_config

    usual = QuantConfig()
    fields = ((name, getattr(quant, name)) for name in _FIXED)
    refuse_other_codes(model, {n: v for n, v in fields if v != getattr(usual, n)})
    source = open_source(model)
    settled, _ = source.settle(quant)
    decoder = parse_config(source.config)
    decoder = replace(decoder, act_dtype=activation_dtype(target, settled.act))
    planner = Planner(source, settled, target)
    network_of(decoder)(decoder, planner, target)
    return [(c.kernel, c.spec, c.demands) for c in planner.calls if c.kernel and c.spec]


_FIXED = {"quant": "--quant", "scale": "--scale", "stages_for": "--layer-quant"}
"""Settings of `QuantConfig` that the codes of a checkpoint have, and their options."""


def refuse_other_codes(model: str | Path, asked: Mapping[str, Any]) -> None:
    """Refuse settings of codes that a checkpoint with codes of its own does not have.

    Args:
        model: what `frontends.open_source` takes.
        asked: names of `_FIXED` and values that were asked for.

    Raises:
        FairyError: a value is another one than the checkpoint's.
    """
    from fairy_compile.frontends.source import open_source

    if not asked or (as_path("the model", model) / MANIFEST).is_file():
        return  # `tasks_of` refuses them all of an artifact
    source = open_source(model)
    own = source.quant or getattr(source, "trained", None)
    for name, value in asked.items():
        if own is not None and value != getattr(own, name):
            raise FairyError(
                f"{model} brings its codes, of {own.quant}, scales per {own.scale}, and does not "
                f"take others; leave {_FIXED[name]} out, or give the model it was made from"
            )


def _calls_of_artifact(directory: Path, target: Target) -> list[Call]:
    manifest = Manifest.load(directory)
    if manifest.target.name != target.name:
        raise FairyError(
            f"{directory} was built for target {manifest.target.name}, and --target is "
            f"{target.name}; give --target {manifest.target.name}, or the model it was built from"
        )
    calls = []
    for layer in manifest.layers:
        if not layer.stages:
            continue
        if not layer.parts or not layer.act or sum(layer.parts) * 2 != layer.shape[0]:
            raise FairyError(
                f"{directory} does not tell the parts of {layer.name}: it is of an earlier "
                "version; build it again, or tune the model it was built from"
            )
        act = layer.act if layer.act in ("int8", "int16") else "float"
        recorded = manifest.model.sizes.get("act_dtype")  # a graph's is the target's
        dtype = activation_dtype(target, manifest.quant.get("act", act), recorded)
        spec = PhaseSpec(
            parts=layer.parts,
            m=_columns(layer.parts, layer.shape),
            stages=layer.stages,
            terms=("U", "W") if layer.terms == "UW" else ("W",),
            scale=layer.scale,
            act=act,
            dtype=dtype,
            out_dtype=dtype,
        )
        kernel = kernel_named(layer.kernel)
        refusal = kernel.unsupported(spec, target)
        if refusal:
            raise FairyError(f"{directory}: {layer.name} was built with {kernel.name}: {refusal}")
        calls.append((kernel, spec, layer.demands))
    return calls


def _columns(parts: Sequence[int], shape: Sequence[int]) -> int:
    if len(shape) != 2 or shape[1] < 2 or shape[1] % 2:
        raise FairyError(f"the artifact has a layer of shape {tuple(shape)}; expected (2n, 2m)")
    return shape[1] // 2
