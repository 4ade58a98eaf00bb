"""Norms of rows on CUDA, and the sum before them in the same launch.

A decode step has a hundred of these; each moves a few kilobytes, so that what counts is the time
from launch to end. A thread holds what it reads in registers, and a row takes one barrier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.cuda_image import image_bytes
from fairy_compile.kernels.cuda_source import CUDA_TYPES, lanes_of, read_files
from fairy_compile.op import ACT_LEVELS

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

NORM = "fairy.rms_norm"
"""Attribute of `build_rms_norm`'s functions, true, with those of its arguments:
`compiler.fuse_norms` may add the sum before, `compiler.quantize_once` may ask for an image."""
_MOST_THREADS = 1024


def serves(size: int, dtype: str) -> bool:
    """Tell whether rows of ``size`` numbers can be read 128 bits at a time."""
    return dtype in CUDA_TYPES and size % lanes_of(dtype) == 0


def threads_of(size: int, dtype: str) -> int:
    """Return the threads of a block."""
    units = size // lanes_of(dtype)
    return min(_MOST_THREADS, -(-units // 32) * 32)


def render(size: int, eps: float, dtype: str, *, add: bool, act: str | None) -> tuple[str, str]:
    """Return (name, CUDA C++) of a device function.

    Its arguments are ``X* x, X* other, float* weight, X* sum, void* y``; ``other`` and ``sum`` are
    used with ``add`` only.
    """
    x = CUDA_TYPES[dtype]
    library = read_files("primitives.cuh", "quantize.cuh", "norm.cuh")
    name = f"{'add_' if add else ''}rms_norm_{size}_{dtype}_{f'{eps:.3e}'.replace('-', 'm')}"
    name += f"_{act}" if act else ""
    name = name.replace(".", "_").replace("+", "p")
    source = f"""{library}
struct {name}_call {{
  typedef {x} X;
  static constexpr int kSize = {size};
  static constexpr int kThreads = {threads_of(size, dtype)};
  static constexpr bool kAdd = {int(add)};
  static constexpr int kLevels = {ACT_LEVELS[act] if act else 0};
  static __device__ __forceinline__ float eps() {{ return {eps!r}f; }}
}};

__device__ __forceinline__ void {name}(const {x}* x, const {x}* other, const float* weight,
                                       {x}* sum, void* y) {{
  fairy::Norm<{name}_call>::run(x, other, weight, sum, y);
}}
"""
    return name, source


def build_rms_norm(
    size: int, eps: float, dtype: str, batch: Batch, *, add: bool = False, act: str | None = None
) -> PrimFunc:
    """Return ``rms_norm``: y = x / sqrt(mean(x²) + eps) * weight, row by row.

    Zhang and Sennrich, arXiv 1910.07467, equation 4. Arguments: x ``dtype`` (b, size), weight
    float32 (size,), y ``dtype`` (b, size). With ``add``: x, other, weight, sum, y, where sum = x +
    other, rounded to ``dtype``, takes the place of x in the equation. With ``act``, ``int16`` or
    ``int8``, y is an image of what it would be: uint8 (b, image_bytes(size / 2, act)).
    """
    from tvm.backend.cuda.op import cuda_func_call
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    name, source = render(size, eps, dtype, add=add, act=act)
    attrs = {"size": size, "eps": eps, "dtype": dtype, "batch": batch, "add": add}
    marks = {NORM: True, **attrs} if act is None else {}
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, **marks})
        rows = 1 if batch == "single" else T.int32()
        x = T.arg("x", T.buffer((rows, size), dtype))
        other = T.arg("other", T.buffer((rows, size), dtype)) if add else x
        weight = T.arg("weight", T.buffer((size,), "float32"))
        total = T.arg("sum", T.buffer((rows, size), dtype)) if add else None
        if act is None:
            y = T.arg("y", T.buffer((rows, size), dtype))
        else:
            y = T.arg("y", T.buffer((rows, image_bytes(size // 2, act)), "uint8"))
        pointers = [b.data for b in (x, other, weight, total if add else x, y)]
        with (
            T.thread_binding(0, rows, "blockIdx.x"),
            T.thread_binding(0, threads_of(size, dtype), "threadIdx.x"),
        ):
            T.evaluate(cuda_func_call(name, *pointers, source_code=source))
        T.func_name(f"{name}_{batch}")
    return ir.get()
