"""The generic kernel: `op.phase_gemm` scheduled for any CPU LLVM knows, float activations.

It is the correctness baseline and the exact contract (``--act float``): correct everywhere, with no
instruction-set assumptions beyond what LLVM's vectoriser finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fairy_compile.kernels.base import ArraySpec, Batch
from fairy_compile.op.spec import PhaseSpec
from fairy_compile.phase import PhaseTensor, pack_codes, tile_shape, unpack_codes

# Lanes of the vectors the schedule asks for; LLVM splits them where registers are narrower.
LANES = 16


class QuartersLayout:
    """Rows of codes in column quarters.

    ``codes`` uint8 (T, terms, n, quarter) with quarter = ceil(m / 64) * 16: bits 2q, 2q+1 of byte
    [t, term, i, j] are the code of complex row i and column q * quarter + j. Complex rows of fused
    parts are stacked. Columns from m on are padding, code 0.

    ``scales`` float32 (T, terms, 2, n_tiles, m_tiles) as in `PhaseTensor`, except that calls of
    several parts keep one scale per row where a tile would straddle parts.
    """

    name = "quarters"

    @staticmethod
    def quarter(m: int) -> int:
        """Return the bytes of a row: columns are padded to four whole vectors."""
        return -(-m // (4 * LANES)) * LANES

    @staticmethod
    def scale_tile(spec: PhaseSpec) -> tuple[int, int]:
        """Return the complex (rows, columns) that share a scale in the packed array."""
        rows, columns = tile_shape(spec.scale, spec.n, spec.m)
        straddles = len(spec.parts) > 1 and any(n % rows for n in spec.parts)
        return (1 if straddles else rows), columns

    def arrays(self, spec: PhaseSpec) -> dict[str, ArraySpec]:
        """See `Layout.arrays`."""
        rows, columns = self.scale_tile(spec)
        lead = (spec.stages, len(spec.terms))
        tiles = (-(-spec.n // rows), -(-spec.m // columns))
        return {
            "codes": ArraySpec((*lead, spec.n, self.quarter(spec.m)), "uint8"),
            "scales": ArraySpec((*lead, 2, *tiles), "float32"),
        }

    def pack(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> dict[str, np.ndarray]:
        """See `Layout.pack`."""
        quarter = self.quarter(spec.m)
        packed = []
        for part in parts:
            padded = np.zeros((*part.codes.shape[:3], 4 * quarter), np.uint8)
            padded[..., : spec.m] = part.unpack()
            by_quarter = padded.reshape(*part.codes.shape[:3], 4, quarter)
            packed.append(pack_codes(np.swapaxes(by_quarter, -1, -2))[..., 0])
        rows, _ = self.scale_tile(spec)
        scales = []
        for part in parts:
            own_rows = tile_shape(spec.scale, part.n, spec.m)[0]
            repeat = 1 if rows == own_rows or len(parts) == 1 else own_rows
            spread = np.repeat(part.scales.astype(np.float32), repeat, axis=3)
            scales.append(spread[:, :, :, : part.n] if repeat > 1 else spread)
        return {
            "codes": np.ascontiguousarray(np.concatenate(packed, axis=2)),
            "scales": np.ascontiguousarray(np.concatenate(scales, axis=3)),
        }

    def unpack(self, arrays: Mapping[str, np.ndarray], spec: PhaseSpec) -> list[PhaseTensor]:
        """See `Layout.unpack`; exact for codes and float32 scales."""
        rows, _ = self.scale_tile(spec)
        out, first = [], 0
        for n in spec.parts:
            codes = unpack_codes(arrays["codes"][:, :, first : first + n, :, None], 4)
            columns = np.swapaxes(codes, -1, -2).reshape(*codes.shape[:3], -1)[..., : spec.m]
            own_rows = tile_shape(spec.scale, n, spec.m)[0]
            tiles = arrays["scales"][:, :, :, first // rows : -(-(first + n) // rows)]
            scales = (
                tiles if len(spec.parts) == 1 or rows == own_rows else tiles[..., ::own_rows, :]
            )
            out.append(PhaseTensor.from_codes(columns, scales, spec.terms, spec.scale))
            first += n
        return out


class GenericKernel:
    """Decode one row of the real matrix at a time, then take its dot product with every x."""

    name = "generic"
    layout = QuartersLayout()
    decode_from = None
    knobs: Mapping[str, Sequence[Any]] = {"rows_per_task": (8, 1, 4, 16, 32)}

    def unsupported(self, spec: PhaseSpec, target: Any) -> str | None:
        """See `PhaseKernel.unsupported`."""
        if target.tvm.get("kind") != "llvm":
            return f"it is scheduled for CPUs; target {target.name} is not one"
        if spec.act != "float":
            return f"it keeps activations in float; {spec.act} was asked for"
        return None

    def demands(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> Mapping[str, Any]:
        """See `PhaseKernel.demands`: nothing, every knob computes the same."""
        return {}

    def build(self, spec: PhaseSpec, target: Any, batch: Batch, knobs: Mapping[str, Any]) -> Any:
        """See `PhaseKernel.build`."""
        from tvm import te, tirx
        from tvm.s_tir import Schedule

        from fairy_compile.op.phase_gemm import phase_gemm

        rows = 1 if batch == "single" else tirx.Var("b", "int64")
        shapes = self.layout.arrays(spec)
        x = te.placeholder((rows, spec.in_features), "float32", name="x")
        codes = te.placeholder(shapes["codes"].shape, "uint8", name="codes")
        scales = te.placeholder(shapes["scales"].shape, "float32", name="scales")
        y, _, _ = phase_gemm(x, codes, scales, spec, self.layout.scale_tile(spec))
        schedule = Schedule(te.create_prim_func([x, codes, scales, y]))
        _schedule_rows(schedule, knobs.get("rows_per_task", self.knobs["rows_per_task"][0]))
        func = schedule.mod["main"].without_attr("global_symbol")
        return func.with_attr({"tirx.noalias": True, "tirx.is_scheduled": True})


def _schedule_rows(sch: Any, rows_per_task: int) -> None:
    """Parallel over blocks of output rows; a row is decoded once and reused by the whole batch."""
    y = sch.get_sblock("y")
    _, _, _, _, c = sch.get_loops(y)
    _, lanes = sch.split(c, [None, LANES])
    partial = sch.rfactor(lanes, factor_axis=2)
    b, j, _ = sch.get_loops(y)
    outer, inner = sch.split(j, [None, rows_per_task])
    sch.reorder(outer, inner, b)
    sch.parallel(outer)
    sch.compute_at(partial, b, preserve_unit_loops=True)
    lanes, _, _, h, q, c = sch.get_loops(partial)[-6:]
    sch.reorder(h, q, c, lanes)
    sch.vectorize(lanes)
    init = sch.decompose_reduction(partial, h)
    sch.vectorize(sch.get_loops(init)[-1])
    weight = sch.get_sblock("weight")
    sch.compute_at(weight, inner, preserve_unit_loops=True)
    _, vector = sch.split(sch.get_loops(weight)[-1], [None, LANES])
    sch.vectorize(vector)
