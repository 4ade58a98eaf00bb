"""CUDA phase GEMM: bit planes in integer tensor cores for few rows of x, 16-bit ones for many.

The kernels are CUDA C++ (`cuda_source/decode.cuh`, `cuda_source/prefill.cuh`), not scheduled TIR.
Both live on one lane owning particular bytes of tensor core fragments, which loops over tensors
cannot say: with TIR every statement would be an intrinsic on hand-numbered registers, as long as
the C++ and harder to read, and it could not be executed without a GPU. The same C++ runs on the CPU
under a shim (`tests/emulation/test_cuda_emulated.py`), where it is compared with the reference that
the tensor expression in `op.phase_gemm` is compared with.

A PrimFunc is a launch: grid and block, and a call of a device function whose source travels with
it (``tirx.cuda.func_call``). So TVM launches it and plans memory around it as with any of its own
kernels.

Numerical contract: decode multiplies exactly what `op.quantize_activations` makes of x, for
``int8`` and ``int16``, and scales and adds in float32. Prefill does not quantise: it rounds x and
the entries of the real matrix to float16 (2^-11) and adds in float32, which is nearer to exact
activations than ``int8``, and not as near as ``int16``. Where activations are bfloat16, which may
be more than float16 holds, operands are bfloat16 (2^-8), sums float32 as before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fairy_compile.kernels.base import SCRATCH, Batch, choose_knobs
from fairy_compile.kernels.cuda_block import MULTIPROCESSORS, decode_block
from fairy_compile.kernels.cuda_grid import Add, Arrange, Launch
from fairy_compile.kernels.cuda_image import digits, image_bytes, record_bytes, serves
from fairy_compile.kernels.cuda_layout import TILE_ROWS, CudaLayout, planes
from fairy_compile.kernels.cuda_source import CUDA_TYPES, Program, render
from fairy_compile.kernels.gpu import GpuKernel
from fairy_compile.op import ACT_LEVELS, PhaseSpec
from fairy_compile.phase import PhaseTensor

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.targets import Target

DECODE = "fairy.decode"
"""Attribute of functions for one row of x, which `compiler.quantize_once` may replace by those that
take an image of it or normalise it: what `kernel_of` reads."""

MIN_ARCH = 80  # integer mma of 32 bytes, cp.async

_SHARED_BYTES = 48 * 1024  # static shared memory of a block, on every architecture
_STATIC_BYTES = 47 * 1024  # of activations in it
_DYNAMIC_BYTES = 96 * 1024  # of activations in dynamic shared memory, on every architecture
_SUM_REGISTERS = 128  # of 255, for the integer sums of decode
_QUANTIZE_THREADS = 128
_ADD_THREADS = 128
_MOST_SPLITS = 8
_NORMED_BYTES = 32 * 1024  # most of a row's integers where every block normalises it
_IMAGE_FROM = 64  # groups of 128 columns, of all rows, that a block would quantise


@dataclass(frozen=True)
class Norm:
    """A root mean square norm before a layer.

    Attributes:
        eps: added to the mean of squares.
        add: x + other is normalised, not x.
    """

    eps: float
    add: bool


class CudaPlanes:
    """The kernel of every call; implements `PhaseKernel`.

    Knobs:
        warps: of a block that decodes, at most: row tiles times warps that split columns.
        row_tiles: row tiles of a block that decodes. ``auto``, as of warps: see `decode_block`.
        asked: groups of 128 columns on their way to a warp's registers, for a row or two of x.
            ``auto``, as of warps: see `decode_block`.
        prefetch: groups of 128 columns on their way to the L2 cache, beyond the next.
        switch: least rows of x that prefill serves.
        tokens: rows of x of a prefill block; fewer where shared memory is short.
        prefill_warps: row tiles of a prefill block.
        buffers: stages of x in shared memory for prefill.
        splits: blocks of prefill that share the columns of a matrix; ``auto`` is as many as keep
            multiprocessors busy where rows of x are few.
    """

    name = "cuda.planes"
    layout = CudaLayout()
    decode_from = None
    knobs: Mapping[str, Sequence[Any]] = {
        "warps": ("auto", 4, 8, 16, 28),
        "row_tiles": ("auto", 1, 2, 4, 7, 14),
        "asked": ("auto", 1, 2),
        "prefetch": (0, 4),
        "switch": (9, 3, 5, 17, 33),
        "tokens": (96, 128, 64, 32),
        "prefill_warps": (4, 8, 2),
        "buffers": (2, 3, 4),
        "splits": ("auto", 1),
    }

    def unsupported(self, spec: PhaseSpec, target: Target) -> str | None:
        """See `PhaseKernel.unsupported`."""
        if target.device != "cuda":
            return f"it is for cuda; target {target.name} runs on {target.device}"
        arch = str(target.tvm.get("arch", ""))
        digits = "".join(c for c in arch if c.isdigit())
        if digits and int(digits) < MIN_ARCH:
            return (
                f"its tensor core instructions need sm_{MIN_ARCH}; target {target.name} is {arch}"
            )
        if spec.act not in ACT_LEVELS:
            known = " or ".join(ACT_LEVELS)
            return f"it computes with {known} activations; this call asks for {spec.act}"
        unknown = {spec.dtype, spec.out_dtype} - set(CUDA_TYPES)
        if unknown:
            return f"it takes {', '.join(CUDA_TYPES)}; this call has {', '.join(unknown)}"
        if spec.dtype == "float32":
            return (
                "it rounds many rows of x to float16 or bfloat16; this call has float32 activations"
            )
        return None

    def demands(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> Mapping[str, Any]:
        """See `PhaseKernel.demands`: nothing, every knob computes the same."""
        return {}

    def build(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """Return a function (x, codes, scales, y) that launches `launches`.

        Raises:
            FairyError: an unknown knob or value.
        """
        from fairy_compile.kernels.cuda_launch import emit

        return emit(spec, self.layout, self.launches(spec, batch, knobs), batch)

    def build_for_model(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """See `ModelKernel`. A single row is left to be quantised by what computes it."""
        from fairy_compile.kernels.cuda_launch import emit

        attrs: dict[str, Any] = {}
        image = None
        if batch == "single":
            call = {"kernel": self.name, "spec": asdict(spec), "knobs": dict(knobs)}
            attrs[DECODE] = json.dumps(call)
            image = False
        launches = self.launches(spec, batch, knobs, image=image)
        needs = [
            [-1 if launch.most is None else launch.most, launch.rows, launch.scratch_bytes]
            for launch in launches
            if launch.scratch_bytes
        ]
        if needs:
            attrs[SCRATCH] = json.dumps(needs)
        return emit(spec, self.layout, launches, batch, attrs, scratch=bool(needs))

    def build_from_image(self, spec: PhaseSpec, knobs: Mapping[str, Any]) -> PrimFunc:
        """Return a function (image, codes, scales, y) for one row that another kernel quantised.

        ``image`` is uint8 (1, image_bytes(m, act)), see `cuda_image`. With ``spec.bias`` the bias
        stands before y, as in `build_for_model`.
        """
        from fairy_compile.kernels.cuda_launch import emit

        (launch,) = self.launches(spec, "single", knobs, image=True)
        return emit(spec, self.layout, [replace(launch, arrange=None)], "single")

    def normalises(self, spec: PhaseSpec) -> bool:
        """Tell whether a layer may normalise its row, which blocks hold at once."""
        row_bytes = self.layout.groups(spec) * record_bytes(spec.act)
        return serves(spec.in_features) and row_bytes <= _NORMED_BYTES

    def build_normed(self, spec: PhaseSpec, knobs: Mapping[str, Any], norm: Norm) -> PrimFunc:
        """Return a function (x, weight, codes, scales, y) for one row that is normalised first.

        As `cuda_norm.build_rms_norm` and `build_for_model` after it. ``weight`` is float32
        (in_features,); with ``norm.add`` the arguments are (x, other, weight, codes, scales, sum,
        y). With ``spec.bias`` the bias follows scales.
        """
        from fairy_compile.kernels.cuda_launch import emit_normed

        chosen = choose_knobs(self, knobs)
        launch = self._decode(spec, chosen, 1, 1, None, image=False, norm=norm)
        return emit_normed(spec, self.layout, launch, add=norm.add)

    def launches(
        self,
        spec: PhaseSpec,
        batch: Batch,
        knobs: Mapping[str, Any],
        *,
        image: bool | None = None,
    ) -> list[Launch]:
        """Return the grids that serve a batch class, by rising number of rows.

        The first whose ``most`` is not exceeded is launched. With ``image`` rows of x that are
        decoded are quantised once, by a grid of their own, not by every block; None does so where
        that is much of a block's work.
        """
        chosen = choose_knobs(self, knobs)
        if batch == "single":
            return [self._decode(spec, chosen, 1, 1, None, image)]
        most = chosen["switch"] - 1
        launches = []
        for slots, operands in self._shapes(spec):
            rows = slots * operands
            launches.append(self._decode(spec, chosen, slots, operands, rows, image))
            if rows >= most:
                break
        launches[-1] = replace(launches[-1], most=most)
        return [*launches, *self._prefills(spec, chosen)]

    @staticmethod
    def _shapes(spec: PhaseSpec) -> list[tuple[int, int]]:
        """Return the (rows of x in an operand, operands) that decode comes in, by rising rows."""
        most = max(1, _SUM_REGISTERS // (4 * planes(spec)))
        operands = [n for n in (1, 2, 4) if n <= most]
        if spec.act == "int16":  # two digits fill an operand with two rows
            return [(2, n) for n in operands]
        return [(2, 1), *((4, n) for n in operands)]

    def _decode(
        self,
        spec: PhaseSpec,
        chosen: Mapping[str, Any],
        slots: int,
        operands: int,
        most: int | None,
        image: bool | None,
        norm: Norm | None = None,
    ) -> Launch:
        block, rows = decode_block(self.layout, spec, chosen, operands), slots * operands
        if image is None:
            image = self.layout.groups(spec) * rows >= _IMAGE_FROM
        constants = {
            "kWarps": block.warps,
            "kTileWarps": block.tiles,
            "kPasses": operands,  # over a group's codes: more sums than registers take
            "kAsked": block.asked,
            "kPrefetch": chosen["prefetch"],
            "kSlots": slots,
            "kOperands": operands,
            "kLevels": ACT_LEVELS[spec.act],
            "kImage": int(image),
            "kNorm": int(norm is not None),
            "kAdd": int(norm is not None and norm.add),
            "kThreads": _QUANTIZE_THREADS,
            "kSharedBytes": _DYNAMIC_BYTES if image else _STATIC_BYTES,
        }
        eps = norm.eps if norm else 0.0
        launch = self._launch("decode", spec, constants, block.tiles, rows, block.warps, most, eps)
        if not image:
            return launch
        groups = self.layout.groups(spec)
        arrange = Arrange(
            function=f"arrange_{launch.function}",
            blocks=math.ceil(groups * 32 / _QUANTIZE_THREADS),
            threads=_QUANTIZE_THREADS,
            rows=1,
        )
        return replace(
            launch,
            image_bytes=rows * image_bytes(spec.m, spec.act),
            shared=self._shared_bytes(spec, slots, operands, block.warps),
            arrange=arrange,
        )

    def _shared_bytes(self, spec: PhaseSpec, slots: int, operands: int, warps: int) -> int:
        """Return the dynamic shared memory of a block: ``Decode::Shared`` of `decode.cuh`."""
        columns, rows = (8 if slots > 1 else digits(spec.act)), slots * operands
        group_bytes = operands * columns * 128 + rows * 32
        groups = self.layout.groups(spec)
        chunks = math.ceil(groups / (_DYNAMIC_BYTES // group_bytes))
        return max(math.ceil(groups / chunks) * group_bytes, warps * rows * 2 * 16 * 4)

    def _prefills(self, spec: PhaseSpec, chosen: Mapping[str, Any]) -> list[Launch]:
        """Return prefill for few and for any number of rows."""
        tokens = chosen["tokens"]
        limits = [*(n for n in (32, 64) if n < tokens), tokens, 4 * tokens]
        launches = [self._prefill(spec, chosen, min(n, tokens), most=n) for n in limits]
        if launches[-1].splits == 1:
            launches.pop()
        if launches[-1].splits == 1:
            return [*launches[:-1], replace(launches[-1], most=None)]
        return [*launches, self._prefill(spec, chosen, tokens, most=None)]

    def _prefill(
        self,
        spec: PhaseSpec,
        chosen: Mapping[str, Any],
        tokens: int,
        most: int | None,
    ) -> Launch:
        warps, buffers = chosen["prefill_warps"], chosen["buffers"]
        row_tables = TILE_ROWS if spec.scale == "row" else 1
        table = row_tables * spec.stages * 8 * 4 ** len(spec.terms)
        while warps * table + buffers * 128 * tokens > _SHARED_BYTES:
            if tokens > 32:
                tokens -= 32
            elif warps > 1:
                warps //= 2
            else:
                buffers = 2
        constants = {"kWarps": warps, "kTokens": tokens, "kBuffers": buffers}
        # A multiprocessor has registers for two blocks.
        slots = 2 * MULTIPROCESSORS
        return self._split("prefill", spec, constants, warps, tokens, warps, most, chosen, slots)

    def _split(
        self,
        program: Program,
        spec: PhaseSpec,
        constants: dict[str, int],
        tiles: int,
        rows: int,
        warps: int,
        most: int | None,
        chosen: Mapping[str, Any],
        slots: int,
        image_bytes: int = 0,
    ) -> Launch:
        """Return a launch whose blocks share columns where ``slots`` would not all have one.

        ``most`` rows of x are what it has at most; any number is taken for enough. Each share has
        at least four groups of columns, whose work hides what a block begins with.
        """
        groups, splits = self.layout.groups(spec), 1
        if most is not None and chosen["splits"] == "auto":
            blocks = math.ceil(self.layout.tiles(spec) / tiles) * math.ceil(most / rows)
            splits = max(1, min(_MOST_SPLITS, groups // 4, slots // blocks))
            splits = math.ceil(groups / math.ceil(groups / splits))  # no share is empty
        constants |= {
            "kSplits": splits, "kImageBytes": image_bytes, "kAddThreads": _ADD_THREADS,
        }  # fmt: skip
        launch = self._launch(program, spec, constants, tiles, rows, warps, most)
        launch = replace(launch, image_bytes=image_bytes)
        if splits == 1:
            return launch
        add = Add(
            function=f"add_{launch.function}",
            blocks=math.ceil(spec.out_features / (2 * _ADD_THREADS)),
            threads=_ADD_THREADS,
        )
        size = 4 * splits * rows * spec.out_features
        return replace(launch, splits=splits, add=add, sum_bytes=size)

    def _launch(
        self,
        program: Program,
        spec: PhaseSpec,
        constants: dict[str, int],
        tiles: int,
        rows: int,
        warps: int,
        most: int | None,
        eps: float = 0.0,
    ) -> Launch:
        name = f"{program}_{_call_name(spec)}_{'_'.join(map(str, constants.values()))}"
        name += f"_{spec.dtype}_{spec.out_dtype}"
        if eps:
            name += f"_{eps:.3e}".replace(".", "_").replace("-", "m").replace("+", "p")
        source = render(program, name, spec, self.layout, constants, eps)
        blocks = -(-self.layout.tiles(spec) // tiles)
        return Launch(name, source, blocks, rows, 32 * warps, most, bias=spec.bias)


CUDA_PLANES = (CudaPlanes(),)
CUDA_WORDS = (GpuKernel("cuda"),)
"""The kernel all GPUs share, for ``--act float``, which is exact."""


def kernel_of(attribute: str) -> tuple[CudaPlanes, PhaseSpec, dict[str, Any]]:
    """Return kernel, call and knobs of a function by its attribute `DECODE`."""
    from fairy_compile.kernels.cuda_hopper import CUDA_HOPPER

    call = json.loads(attribute)
    spec = {k: tuple(v) if isinstance(v, list) else v for k, v in call["spec"].items()}
    kernels = {kernel.name: kernel for kernel in (*CUDA_PLANES, *CUDA_HOPPER)}
    return kernels[call["kernel"]], PhaseSpec(**spec), call["knobs"]


def _call_name(spec: PhaseSpec) -> str:
    return (
        f"n{'_'.join(map(str, spec.parts))}_m{spec.m}_t{spec.stages}"
        f"{''.join(spec.terms).lower()}_{spec.scale}_{spec.act}{'_bias' if spec.bias else ''}"
    )
