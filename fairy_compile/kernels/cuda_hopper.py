"""CUDA phase GEMM on Hopper: `cuda.planes`, with warpgroup tensor cores for many rows of x.

`cuda_source/hopper.cuh` says how. Its instructions exist on sm_90a alone (H100, H200, GH200), so it
serves targets that are compiled for nothing else. Numbers are those of `cuda.planes`: prefill
rounds x and the entries of the real matrix to float16, or to bfloat16 where x is, and adds in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_block import MULTIPROCESSORS
from fairy_compile.kernels.cuda_grid import Arrange, Launch
from fairy_compile.kernels.cuda_layout import BLOCK, TILE_ROWS, planes
from fairy_compile.op import PhaseSpec

if TYPE_CHECKING:
    from fairy_compile.targets import Target

ARCH = "sm_90a"

_SHARED_BYTES = 227 * 1024  # of a block on Hopper, barriers included
_BARRIER_BYTES = 1024
_JOINT_BYTES = 256 * 2 * 32 * 4  # of tables of values of a byte, halves of y and lanes
_JOINT_START = 32 * 1024  # of what precedes them in shared memory, so that they begin at 64 KB
_STAGED_BYTES = 128 * (128 + 8) * 4  # of outputs on their way to y, over x and tables
_WARPS = 8
_TILES = 4  # row tiles of a block
_ARRANGE_THREADS = 128


class CudaHopper(CudaPlanes):
    """The kernel of every call on Hopper; implements `PhaseKernel`.

    Knobs, beside those of `CudaPlanes`:
        wide: least rows of x that warpgroup instructions serve.
        wide_tokens: rows of x of their block.
        wide_buffers: blocks of 32 complex columns of x in shared memory; fewer where it is short.
        ahead: whether weights are looked up before multiplications begin, not after.
    """

    name = "cuda.hopper"
    knobs: Mapping[str, Sequence[Any]] = {
        **CudaPlanes.knobs,
        "prefetch": (0,),  # others were slower on an H200
        "switch": (9, 5, 17),
        "tokens": (96, 64),
        "prefill_warps": (4, 8),
        "buffers": (2, 3),
        "wide": (129, 65),
        "wide_tokens": (256, 128),
        "wide_buffers": (4, 3, 6),
        "ahead": (1, 0),
    }

    def unsupported(self, spec: PhaseSpec, target: Target) -> str | None:
        """See `PhaseKernel.unsupported`."""
        from fairy_compile.compiler.cuda_binary import archs

        reason = super().unsupported(spec, target)
        if reason is None and archs(target) != (ARCH,):
            compiled = ", ".join(archs(target))
            return f"it is for {ARCH} alone; target {target.name} is compiled for {compiled}"
        return reason

    def _prefills(self, spec: PhaseSpec, chosen: Mapping[str, Any]) -> list[Launch]:
        """Return prefill for few and for any number of rows."""
        narrow, most, tokens = [], chosen["wide"] - 1, chosen["wide_tokens"]
        for launch in super()._prefills(spec, chosen):
            if launch.most is not None and launch.most < most:
                narrow.append(launch)
                continue
            narrow.append(self._prefill(spec, chosen, chosen["tokens"], most))
            break
        wide = [self._wide(spec, chosen, n) for n in (tokens, 2 * tokens)]
        while wide and wide[-1].splits == 1:
            wide.pop()
        return [*narrow, *wide, self._wide(spec, chosen, None)]

    def _wide(self, spec: PhaseSpec, chosen: Mapping[str, Any], most: int | None) -> Launch:
        tokens, buffers = chosen["wide_tokens"], chosen["wide_buffers"]
        joint = _has_joint_tables(spec)
        start = _JOINT_START if joint else 0
        table_rows = TILE_ROWS if spec.scale == "row" else 1
        own_tables = _WARPS * table_rows * spec.stages * 4 * 4 ** len(spec.terms)
        tables = _JOINT_BYTES if joint else own_tables
        block_bytes = 2 * BLOCK * 2 * tokens  # both halves of x, 16 bits a number
        room = _SHARED_BYTES - start - tables - _BARRIER_BYTES
        buffers = min(buffers, room // block_bytes)
        shared = start + max(buffers * block_bytes + tables, _STAGED_BYTES) + _BARRIER_BYTES
        constants = {
            "kTokens": tokens,
            "kBuffers": buffers,
            "kThreads": _ARRANGE_THREADS,
            "kAhead": chosen["ahead"],
            "kJoint": int(joint),
            "kSharedBytes": shared,
        }
        blocks = math.ceil(spec.m / BLOCK)
        launch = self._split(
            "hopper", spec, constants, _TILES, tokens, _WARPS, most, chosen, MULTIPROCESSORS,
            image_bytes=blocks * block_bytes,
        )  # fmt: skip
        arrange = Arrange(
            function=f"arrange_{launch.function}",
            blocks=2 * blocks,
            threads=_ARRANGE_THREADS,
            rows=_ARRANGE_THREADS,
        )
        return replace(launch, shared=shared, arrange=arrange)


def _has_joint_tables(spec: PhaseSpec) -> bool:
    """Tell whether the codes of a weight fill a byte, and a block has one set of scales.

    See `cuda_source/hopper_tables.cuh`.
    """
    inside = all(rows % (_TILES * TILE_ROWS) == 0 for rows in spec.parts[:-1])
    return spec.scale == "tensor" and spec.stages > 1 and planes(spec) == 8 and inside


CUDA_HOPPER = (CudaHopper(),)
