"""The phase kernel that all GPU backends without integer matrix units share.

One packed weight (`gpu_layout`), two ways through it: `gpu_decode` for few rows of x, `gpu_prefill`
for many. A backend says how threads add up their sums and which matrix units it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels import gpu_products
from fairy_compile.kernels.base import Batch, choose_knobs
from fairy_compile.kernels.gpu_builder import build_function, ceildiv, launch_if, reduce_group
from fairy_compile.kernels.gpu_decode import Decode, DecodeShape, Lookup, Reduce
from fairy_compile.kernels.gpu_halves import (
    BLOCK_BYTES,
    BlocksDecode,
    HalvesDecode,
    block_entries,
    supports,
    supports_blocks,
)
from fairy_compile.kernels.gpu_layout import WordsLayout
from fairy_compile.kernels.gpu_prefill import phase_tile_gemm
from fairy_compile.kernels.gpu_products import ProductsDecode
from fairy_compile.kernels.gpu_rows import AllRows, ChosenRows, LedRows, OneRow, PackedRows, Stacked
from fairy_compile.kernels.gpu_tile import GROUP, TileGemm
from fairy_compile.kernels.gpu_tile_tables import TilesDecode, tiles_shape
from fairy_compile.kernels.gpu_weights import Weights
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor

if TYPE_CHECKING:
    from tvm.tirx import Buffer, PrimFunc

    from fairy_compile.targets import Target

_MAX_WORDS = 2**31 - 1  # offsets are int32
# Thread groups that keep a GPU busy; with fewer, more threads share a row.
_GROUPS = 128
# Where looking weights up takes fewer operations than decoding them; see the knob.
_TABLE_DEVICES = ("metal", "opencl", "vulkan")
_KINDS: dict[str, type[Decode]] = {
    "halves": HalvesDecode,
    "blocks": BlocksDecode,
    "products": ProductsDecode,
    "tiles": TilesDecode,
}


class GpuKernel:
    """Phase GEMM for one kind of device; implements `PhaseKernel` and `ExpertsKernel`.

    Knobs:
        threads: threads that share a matrix row while decoding; ``auto`` takes more of them where
            rows are few.
        rows: complex matrix rows of such a team.
        tokens: rows of x that one pass of decoding serves, in batch ``many``.
        weights: while decoding, ``table`` looks them up in shared memory (with scales a tile by
            teams of four threads, whatever ``threads`` is, and where a team's rows would lie in two
            tiles the same as ``bits``), ``bits`` computes them from their bits; ``auto`` is what
            takes fewer operations on the device, by `benchmarks/gpu_static.py`. ``halves`` and
            ``blocks`` look up and multiply in float16, see `gpu_halves`: with float16 activations,
            input features a multiple of 32, for ``blocks`` also with tensor scales and T <= 2
            (elsewhere ``blocks`` is the same as ``halves``, and ``halves`` the same as ``table``).
            ``products`` looks products with x up, see `gpu_products`: of one row of x, with tensor
            scales, where thread groups have rows of one part and enough shared memory (elsewhere it
            is the same as ``table``).
        copies: of the table of ``blocks``, fewer where shared memory is short.
        group: threads of a group that decodes.
        ahead: while decoding, load the words of the next turn before this turn's are used.
        switch: most rows of x that are served by decoding; more go to the tiled GEMM.
        tile_tokens: rows of x of a tile.
    """

    layout = WordsLayout()
    decode_from = None
    knobs: Mapping[str, Sequence[Any]] = {
        "threads": ("auto", 16, 32, 64, 128),
        "rows": (2, 1, 4, 8),
        "tokens": (4, 2, 1, 8),
        "weights": ("auto", "table", "bits", "halves", "blocks", "products"),
        "copies": (16, 1),
        "group": (128, 256, 512),
        "ahead": (False, True),
        "switch": (8, 0, 4, 16, 32),
        "tile_tokens": ("auto", 32, 64),
    }

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = f"{device}.words"
        self._built: dict[Any, PrimFunc] = {}

    def unsupported(self, spec: PhaseSpec, target: Target) -> str | None:
        """See `PhaseKernel.unsupported`."""
        if target.device != self.device or target.limits is None:
            return f"it is for {self.device}; target {target.name} runs on {target.device}"
        if spec.act != "float":
            return f"it keeps activations in floating point; this call asks for {spec.act}"
        if spec.dtype != "float32" and not target.has(spec.dtype):
            return (
                f"target {target.name} keeps no activations in {spec.dtype}; --act float computes "
                "in float32"
            )
        most = target.limits.max_threads
        if most < GROUP:
            return f"it needs {GROUP} threads a group; target {target.name} has {most}"
        words = self.layout.arrays(spec)["codes"].nbytes // 4
        if words > _MAX_WORDS:
            return f"the packed codes take {words} words; its offsets reach {_MAX_WORDS}"
        shared = self.shared_bytes(spec, target)
        if shared > target.limits.shared_bytes:
            return (
                f"it needs {shared} bytes of shared memory; target {target.name} has "
                f"{target.limits.shared_bytes}"
            )
        return None

    def demands(self, parts: Sequence[PhaseTensor], spec: PhaseSpec) -> Mapping[str, Any]:
        """See `PhaseKernel.demands`: nothing, every knob computes the same."""
        return {}

    def shared_bytes(self, spec: PhaseSpec, target: Target) -> int:
        """Return the shared memory of the larger launch with default knobs."""
        size = 2 if spec.dtype == "float16" else 4
        return 32 * (64 + self._tile_tokens(spec, "auto")) * size

    def build(
        self, spec: PhaseSpec, target: Target, batch: Batch, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """See `PhaseKernel.build`.

        Raises:
            FairyError: an unknown knob or value.
        """
        chosen = choose_knobs(self, knobs)
        key = (spec, target.name, target.limits, target.features, batch, tuple(chosen.items()))
        if key not in self._built:  # layers of one shape share a function
            self._built[key] = self._build(spec, target, batch, chosen)
        return self._built[key]

    def _build(
        self, spec: PhaseSpec, target: Target, batch: Batch, chosen: Mapping[str, Any]
    ) -> PrimFunc:
        arrays = self.layout.arrays(spec)

        def body() -> None:
            rows: Any = 1 if batch == "single" else T.int32()
            x = T.arg("x", T.buffer((rows, spec.in_features), spec.dtype))
            packed = [
                T.arg(name, T.buffer(array.shape, array.dtype)) for name, array in arrays.items()
            ]
            y = T.arg("y", T.buffer((rows, spec.out_features), spec.out_dtype))
            weights = Weights(spec, *packed)
            if batch == "single":
                self._decode(weights, x, y, 1, target, chosen).emit(AllRows(rows))
                return
            decode = self._decode(weights, x, y, chosen["tokens"], target, chosen)
            gemm = self._gemm(weights, y, target, chosen)
            switch = chosen["switch"]
            if not switch:
                gemm.emit(x, AllRows(rows))
                return
            with launch_if(rows <= switch):
                decode.emit(AllRows(rows))
            with launch_if(rows > switch):
                gemm.emit(x, AllRows(rows))

        return build_function("phase_gemm", body).without_attr("global_symbol")

    def _decode(
        self,
        weights: Weights,
        x: Buffer | OneRow,
        y: Buffer,
        tokens: int,
        target: Target,
        chosen: Mapping[str, Any],
    ) -> Decode:
        shape = self._decode_shape(weights.spec, target, tokens, chosen)
        kind = _KINDS.get(shape.weights, Decode)
        return kind(weights, x, y, shape, self.reduction(shape, target))

    def _gemm(
        self, weights: Weights, y: Buffer, target: Target, chosen: Mapping[str, Any]
    ) -> TileGemm:
        tile_tokens = self._tile_tokens(weights.spec, chosen["tile_tokens"])
        return self.tile_gemm(weights, y, tile_tokens, target, chosen)

    def unsupported_experts(self, spec: PhaseSpec, experts: int) -> str | None:
        """See `ExpertsKernel.unsupported_experts`."""
        words = experts * self.layout.arrays(spec)["codes"].nbytes // 4
        if words > _MAX_WORDS:
            return (
                f"the packed codes of {experts} experts take {words} words; its offsets reach "
                f"{_MAX_WORDS}"
            )
        return None

    def build_chosen(
        self,
        spec: PhaseSpec,
        experts: int,
        chosen: int,
        x_rows: int,
        target: Target,
        knobs: Mapping[str, Any],
    ) -> PrimFunc:
        """See `ExpertsKernel.build_chosen`: one launch, whose grid has a dimension of choices.

        Raises:
            FairyError: an unknown knob or value.
        """
        values = choose_knobs(self, knobs)

        def body() -> None:
            x = T.arg("x", T.buffer((x_rows, spec.in_features), spec.dtype))
            ids = T.arg("ids", T.buffer((1, chosen), "int32"))
            stacked = self._stacked(spec, experts)
            y = T.arg("y", T.buffer((chosen, spec.out_features), spec.out_dtype))
            rows_of_x = x if x_rows == chosen else OneRow(x)
            decode = self._decode(Weights(spec, *stacked), rows_of_x, y, 1, target, values)
            decode.emit(ChosenRows(ids, stacked))

        return build_function("phase_gemm_chosen", body).without_attr("global_symbol")

    def build_grouped(
        self, spec: PhaseSpec, experts: int, target: Target, knobs: Mapping[str, Any]
    ) -> PrimFunc:
        """See `ExpertsKernel.build_grouped`.

        Knob ``switch`` is meant for the rows of an expert: decoding serves ``switch * experts``.

        Raises:
            FairyError: an unknown knob or value.
        """
        values = choose_knobs(self, knobs)

        def body() -> None:
            rows: Any = T.int32()
            x = T.arg("x", T.buffer((rows, spec.in_features), spec.dtype))
            starts = T.arg("starts", T.buffer((experts + 1,), "int32"))
            stacked = self._stacked(spec, experts)
            y = T.arg("y", T.buffer((rows, spec.out_features), spec.out_dtype))
            weights, switch = Weights(spec, *stacked), values["switch"] * experts
            decode = self._decode(weights, x, y, values["tokens"], target, values)
            arguments = (x, starts, *(array.buffer for array in stacked), y)
            gemm = self._gemm(weights, y, target, values)
            with launch_if(rows <= switch):
                decode.emit(LedRows(rows, starts, stacked, arguments))
            with launch_if(rows > switch):
                gemm.emit(x, PackedRows(rows, starts, stacked, arguments))

        return build_function("phase_gemm_grouped", body).without_attr("global_symbol")

    def _stacked(self, spec: PhaseSpec, experts: int) -> list[Stacked]:
        """Declare the packed arrays of all experts as arguments."""
        arrays = self.layout.arrays(spec).items()
        return [
            Stacked(T.arg(name, T.buffer((experts, *array.shape), array.dtype)))
            for name, array in arrays
        ]

    def reduction(self, shape: DecodeShape, target: Target) -> Reduce:
        """Return how the threads of a team add up their sums: through shared memory."""

        def reduce(values: Sequence[Any], thread: Any, team: Any) -> Sequence[Any]:
            return reduce_group(
                values, lambda a, b: a + b, thread, shape.threads, team=team, teams=shape.teams
            )

        return reduce

    def reduce_bytes(self, shape: DecodeShape, target: Target) -> int:
        """Return the shared memory that adding up a group's sums takes."""
        return 2 * shape.rows * shape.tokens * shape.teams * shape.threads * 4

    def tile_gemm(
        self, weights: Weights, y: Buffer, tokens: int, target: Target, knobs: Mapping[str, Any]
    ) -> TileGemm:
        """Return the launch for many rows of x."""
        return phase_tile_gemm(weights, y, tokens)

    def _decode_shape(
        self, spec: PhaseSpec, target: Target, tokens: int, knobs: Mapping[str, Any]
    ) -> DecodeShape:
        rows, threads = knobs["rows"], knobs["threads"]
        group = min(knobs["group"], target.limits.max_threads)
        if threads == "auto":
            threads = max(32, target.limits.simd_width)
            groups = ceildiv(spec.n, rows * max(1, group // threads))
            if groups < _GROUPS and spec.m > 64 * 32:
                threads = 128
        shape = DecodeShape(
            threads, max(1, group // threads), rows, tokens, ahead=bool(knobs["ahead"])
        )
        if knobs["weights"] == "products":
            products = self._products_shape(spec, target, shape)
            if products is not None:
                return products
        lookup = self._lookup(spec, shape, knobs["weights"])
        if lookup == "table" and spec.scale == "tile64":
            return tiles_shape(spec, shape) or shape
        if lookup != "blocks":
            return replace(shape, weights=lookup)
        room = target.limits.shared_bytes - self.reduce_bytes(shape, target)
        most = room // (BLOCK_BYTES * block_entries(spec))
        copies = min(knobs["copies"], 1 << max(0, most.bit_length() - 1))
        return replace(shape, weights=lookup, copies=copies)

    @staticmethod
    def _products_shape(spec: PhaseSpec, target: Target, shape: DecodeShape) -> DecodeShape | None:
        """Return the shape of a launch that looks products up; None where there is none."""
        threads = min(shape.threads, gpu_products.MOST_THREADS)
        teams = shape.threads * shape.teams // threads
        products = replace(shape, threads=threads, teams=teams, weights="products")
        served = shape.tokens == 1 and gpu_products.supports(spec, products)
        fits = gpu_products.shared_bytes(spec, products) <= target.limits.shared_bytes
        return products if served and fits else None

    def _lookup(self, spec: PhaseSpec, shape: DecodeShape, knob: str) -> Lookup:
        """Return how a call gets its weights; see the knob ``weights``."""
        if knob == "auto":
            knob = "table" if self.device in _TABLE_DEVICES else "bits"
        if knob == "blocks" and supports_blocks(spec, shape.group_rows):
            return "blocks"
        if knob in ("halves", "blocks") and supports(spec):
            return "halves"
        return "bits" if knob == "bits" else "table"

    @staticmethod
    def _tile_tokens(spec: PhaseSpec, knob: Any) -> int:
        """Return the rows of x of a tile: half as many where elements take twice the memory."""
        if knob != "auto":
            return knob
        return 64 if spec.dtype == "float16" else 32
