"""`PhaseSpec`: everything about one phase GEMM call that is known when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from fairy_compile.config import ActContract, Granularity, Term


@dataclass(frozen=True)
class PhaseSpec:
    """Shape and contract of one phase GEMM: x (batch, 2m) -> y (batch, 2 * sum(parts)).

    A call may serve several fused layers (QKV, gate/up). Each part is a widely-linear map of its
    own with its own scales; complex rows are stacked part by part, and the real output is
    ``[Re part0, Im part0, Re part1, Im part1, ...]``, i.e. the layers' outputs side by side.

    Attributes:
        parts: complex output rows n of each fused layer.
        m: complex columns; input features are 2m, laid out [Re x, Im x].
        stages: T, the same for all parts.
        terms: ("U", "W") or ("W",).
        scale: granularity of the scales in the source tensors.
        act: activation contract.
        dtype: of x, ``float32``, ``float16`` or ``bfloat16``.
        out_dtype: of y, likewise.
        bias: whether the kernel adds a bias to y, float32 (2n,); only those of a `ModelKernel` do.
    """

    parts: tuple[int, ...]
    m: int
    stages: int
    terms: tuple[Term, ...]
    scale: Granularity
    act: ActContract
    dtype: str = "float32"
    out_dtype: str = "float32"
    bias: bool = False

    @property
    def n(self) -> int:
        """Complex rows of all parts together."""
        return sum(self.parts)

    @property
    def in_features(self) -> int:
        """Real input features, 2m."""
        return 2 * self.m

    @property
    def out_features(self) -> int:
        """Real output features, 2n."""
        return 2 * self.n

    def output_runs(self) -> list[tuple[int, int, int]]:
        """Return (first complex row, rows, first real output feature) of each part.

        Row ``first + i`` of a part writes Re to ``feature + i`` and Im to ``feature + rows + i``.
        """
        runs, row = [], 0
        for rows in self.parts:
            runs.append((row, rows, 2 * row))
            row += rows
        return runs

    def describe(self) -> str:
        """Return a short text for reports, e.g. ``8192x4096 T=2 UW tensor int8``."""
        return (
            f"{self.out_features}x{self.in_features} T={self.stages} "
            f"{''.join(self.terms)} {self.scale} {self.contract}"
        )

    @property
    def contract(self) -> str:
        """What activations are computed with: ``int8``, ``int16``, ``float`` or ``float16``."""
        return self.dtype if self.act == "float" and self.dtype != "float32" else self.act
