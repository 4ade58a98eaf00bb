"""Kernels that phase kernels are compared with: 4-bit groups and dense float16, the same compiler.

They implement what a model asks of a phase kernel (`fairy_compile.kernels.base.PhaseKernel`), so
that a model with such weights differs from a phase model in these kernels alone. Weights:

- ``FourBit``: MLC's q4f16_1. ``weight`` uint32 (out, in / 8), code i of a word at bits 4 i;
  ``scale`` float16 (out, in / 32); a weight is (code - 7) scale.
- ``Dense``: ``weight`` float16 (out, in).

Few rows of x are vector products that read 128 bits a lane and sum in float32 (4-bit weights: in
float16 within a group of 32); more rows go to float16 tensor cores, into which 4-bit weights are
unpacked tile by tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.kernels import cuda_source
from fairy_compile.kernels.base import ArraySpec, Batch
from fairy_compile.kernels.cuda import Launch
from fairy_compile.kernels.cuda_source import CUDA_TYPES
from fairy_compile.op import PhaseSpec

GROUP = 32
_HERE = Path(__file__).parent
_WARPS = 8
# Vector products read every weight once for as many rows of x.
_ROWS = {"four_bit": (1, 2, 4, 8), "dense": (1, 2, 4)}


@dataclass(frozen=True)
class PeerLayout:
    """Arrays of one form of weights, in the order kernels take them."""

    name: str

    def arrays(self, spec: PhaseSpec) -> Mapping[str, ArraySpec]:
        """Return name -> shape and dtype."""
        out, size = spec.out_features, spec.in_features
        if self.name == "dense":
            return {"weight": ArraySpec((out, size), "float16")}
        return {
            "weight": ArraySpec((out, size // 8), "uint32"),
            "scale": ArraySpec((out, size // GROUP), "float16"),
        }


class PeerKernel:
    """A kernel with weights of ``layout``; only the sizes of a spec matter to it."""

    knobs: Mapping[str, Sequence[Any]] = {}
    decode_from = None

    def __init__(self, layout: str) -> None:
        self.layout = PeerLayout(layout)
        self.name = f"peer.{layout}"

    def build(self, spec: PhaseSpec, target: Any, batch: Batch, knobs: Mapping[str, Any]) -> Any:
        """Return a function (x, *arrays, y), see `PhaseKernel.build`."""
        from tvm.script.ir_builder import IRBuilder
        from tvm.tirx.script import builder as T

        from fairy_compile.kernels.cuda_launch import launch_first

        launches = self.launches(spec, batch)
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            rows = 1 if batch == "single" else T.int32()
            x = T.arg("x", T.buffer((rows, spec.in_features), "float16"))
            arrays = [
                T.arg(n, T.buffer(a.shape, a.dtype)) for n, a in self.layout.arrays(spec).items()
            ]
            y = T.arg("y", T.buffer((rows, spec.out_features), spec.out_dtype))
            if len(arrays) == 1:
                arrays = [*arrays, arrays[0]]  # dense weights have no scales
            launch_first(launches, rows, [buffer.data for buffer in (x, *arrays, y)])
            T.func_name(f"{launches[-1].function}_{batch}")
        return ir.get()

    def launches(self, spec: PhaseSpec, batch: Batch) -> list[Launch]:
        """Return the grids that serve a batch class, by rising number of rows."""
        few = [self._vectors(spec, rows) for rows in _ROWS[self.layout.name]]
        if batch == "single":
            return few[:1]
        return [
            *few,
            self._matrices(spec, (1, 1, 1, 4), most=16),
            self._matrices(spec, (2, 2, 2, 4), most=64),
            self._matrices(spec, (4, 4, 2, 4), most=None),
        ]

    def _vectors(self, spec: PhaseSpec, rows: int) -> Launch:
        own = 2 if rows < 8 else 1
        constants = {"kWarps": _WARPS, "kOwn": own, "kRows": rows}
        blocks = -(-spec.out_features // (_WARPS * own))
        return self._launch("vectors", spec, constants, blocks, rows, 32 * _WARPS, rows)

    def _matrices(
        self, spec: PhaseSpec, tiles: tuple[int, int, int, int], most: int | None
    ) -> Launch:
        token_tiles, feature_tiles, token_warps, feature_warps = tiles
        tokens, features = 16 * token_tiles * token_warps, 8 * feature_tiles * feature_warps
        # 48 KB: a row of a tile has 64 bytes.
        if self.layout.name == "dense":
            buffers = min(8, 768 // (tokens + features))
        else:
            buffers = min(8, (768 - 2 * features) // tokens)
        constants = {
            "kTokenTiles": token_tiles,
            "kFeatureTiles": feature_tiles,
            "kTokenWarps": token_warps,
            "kFeatureWarps": feature_warps,
            "kBuffers": buffers,
        }
        blocks = -(-spec.out_features // features)
        threads = 32 * token_warps * feature_warps
        return self._launch("matrices", spec, constants, blocks, tokens, threads, most)

    def _launch(
        self,
        program: str,
        spec: PhaseSpec,
        constants: dict[str, int],
        blocks: int,
        rows: int,
        threads: int,
        most: int | None,
    ) -> Launch:
        sizes = {"kIn": spec.in_features, "kOut": spec.out_features}
        values = {**sizes, **constants, "kFourBit": int(self.layout.name == "four_bit")}
        # Prefixes of kernels that wait themselves for the one before, see `cuda_source`.
        prefix = "decode" if program == "vectors" else "prefill"
        numbers = "_".join(map(str, values.values()))
        name = f"{prefix}_peer_{self.layout.name}_{numbers}_{spec.out_dtype}"
        return Launch(
            name, _render(program, name, spec.out_dtype, values), blocks, rows, threads, most
        )


def _render(program: str, name: str, out_dtype: str, values: Mapping[str, int]) -> str:
    """Return CUDA C++ that defines the device function ``name``."""
    y = CUDA_TYPES[out_dtype]
    lines = [f"  static constexpr int {key} = {value};" for key, value in values.items()]
    kernel = {"vectors": "Vectors", "matrices": "Matrices"}[program]
    return f"""{_source(program)}
struct {name}_call {{
  typedef {y} Y;
{chr(10).join(lines)}
}};

__device__ __forceinline__ void {name}(const __half* x, const void* weights, const void* scales,
                                       {y}* y, int batch) {{
  peer::{kernel}<{name}_call>::run(x, weights, (const __half*)scales, y, batch);
}}
"""


@cache
def _source(program: str) -> str:
    """Return the templates that a program needs, after the project's own primitives."""
    files = [Path(cuda_source.__file__).with_name("primitives.cuh"), _HERE / "vectors.cuh"]
    if program == "matrices":
        files.append(_HERE / "matrices.cuh")
    return "\n".join(file.read_text("utf-8") for file in files)


FOUR_BIT, DENSE = PeerKernel("four_bit"), PeerKernel("dense")


def unpack(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the float32 matrix (out, in) of packed weights."""
    if "scale" not in arrays:
        return arrays["weight"].astype(np.float32)
    words = arrays["weight"]
    codes = words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    codes = codes.reshape(len(words), -1).astype(np.float32) - 7
    return codes * np.repeat(arrays["scale"].astype(np.float32), GROUP, axis=1)
