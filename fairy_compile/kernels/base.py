"""What every kernel family provides, whatever the backend.

A kernel family is a `Layout` (how the packed weight of one call lies in memory) plus a
`PhaseKernel` (a generator of scheduled functions over it). Compiler, tuner, report and tests know
only these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from fairy_compile.errors import FairyError
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.phase import PhaseTensor

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.targets import Target

Activation = Literal["silu", "gelu_tanh"]
"""Of gated feed-forward layers."""

Batch = Literal["single", "decode", "many"]
"""Batch class of a function: ``single`` has exactly one row, the others a symbolic number of them.
``decode`` computes each bit for bit as ``single`` would, so that an answer does not depend on what
runs beside it; ``many`` is free to be faster."""


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one packed array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Layout(Protocol):
    """How the weight of one phase GEMM lies in memory; documented by an index formula."""

    name: str

    def arrays(self, spec: PhaseSpec) -> Mapping[str, ArraySpec]:
        """Return name -> shape and dtype of the packed arrays, in kernel argument order."""

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """Pack the parts of one call; the arrays match `arrays(spec)`."""

    def unpack(self, arrays: Mapping[str, np.ndarray], spec: PhaseSpec) -> list[PhaseTensor]:
        """Undo `pack`. Codes come back exactly, scales to the precision the layout keeps."""


@dataclass(frozen=True)
class Cost:
    """Least work of one call: what a perfect kernel would read and compute."""

    weight_bytes: int
    operations: int


class PhaseKernel(Protocol):
    """A generator of phase GEMM functions over one layout.

    Attributes:
        name: ``backend.kernel``, e.g. ``x86.codebook``; shown in reports.
        layout: the packed form it reads.
        knobs: named choices for the tuner; the first of each is the default.
        decode_from: fewest rows that ``decode`` and ``many`` compute differently; None where the
            kernel has but one function for both.
    """

    name: str
    layout: Layout
    knobs: Mapping[str, Sequence[Any]]
    decode_from: int | None

    def unsupported(self, spec: PhaseSpec, target: Target) -> str | None:
        """Return None if the kernel can serve ``spec`` on ``target``, else the reason in words."""

    def demands(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> Mapping[str, Any]:
        """Return the knob values that these very weights need to be computed accurately.

        They override defaults and tuned values; most kernels demand nothing.
        """

    def build(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """Return a scheduled function (x, *arrays in `layout.arrays` order, y).

        x is (b, 2m) in ``spec.dtype`` and y (b, 2n) in ``spec.out_dtype``, both float32 on CPUs; b
        is 1 for batch ``single`` and symbolic for the others.
        """


SCRATCH = "fairy.scratch"
"""Attribute of functions that take scratch memory: JSON, a list of [most rows, step, bytes].

Up to so many rows (-1: any number), each ``step`` of them begun take ``bytes``; the largest need
counts."""


@runtime_checkable
class ModelKernel(Protocol):
    """A kernel that takes more off a model than `PhaseKernel` asks.

    It leaves it to the caller to allocate what it needs: then a model's memory plan covers it, and
    a recorded launch finds it where it was. And it adds biases.
    """

    def build_for_model(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """Do as `PhaseKernel.build`, with arguments more.

        With ``spec.bias`` a bias float32 (2n,) before y; where `SCRATCH` says so memory uint8
        (bytes,) after it.
        """


@runtime_checkable
class ExpertsKernel(Protocol):
    """A kernel of a GPU that multiplies rows by the matrices of different experts.

    All experts of a layer have one spec; its arrays lie stacked, with experts as first dimension.
    (On CPUs, `experts_cpu.build_grouped` makes such a function from those of any `PhaseKernel`.)
    """

    def unsupported_experts(self, spec: PhaseSpec, experts: int) -> str | None:
        """Return None, or the reason in words why it has no calls for so many ``spec``."""

    def build_chosen(
        self,
        spec: PhaseSpec,
        experts: int,
        chosen: int,
        x_rows: int,
        target: Target,
        knobs: Mapping[str, Any],
    ) -> PrimFunc:
        """Return a scheduled function (x, ids, *arrays, y) for one token.

        x is (x_rows, 2m), 1 row for all choices or ``chosen``, one each; ids int32 (1, chosen); y
        (chosen, 2n). Knobs are those of batch ``single``.
        """

    def build_grouped(
        self, spec: PhaseSpec, experts: int, target: Target, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """Return a scheduled function (x, starts, *arrays, y) for any number of rows.

        x is (r, 2m), sorted by expert, starts int32 (experts + 1,) as `experts_cpu.build_group`
        gives it, y (r, 2n). Knobs are those of batch ``many``.
        """


def choose_knobs(kernel: PhaseKernel, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value for every knob of ``kernel``: the given one, or the default.

    Raises:
        FairyError: an unknown knob or value.
    """
    for knob, value in knobs.items():
        if value not in kernel.knobs.get(knob, ()):
            known = "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in kernel.knobs.items())
            raise FairyError(
                f"{kernel.name} has no knob {knob} with the value {value!r}; allowed: {known}"
            )
    return {k: knobs.get(k, values[0]) for k, values in kernel.knobs.items()}


def cost(kernel: PhaseKernel, spec: PhaseSpec, batch: int) -> Cost:
    """Return the least bytes of weights and multiply-adds of one call with ``batch`` rows."""
    weight_bytes = sum(a.nbytes for a in kernel.layout.arrays(spec).values())
    return Cost(weight_bytes, 2 * batch * spec.in_features * spec.out_features)
