"""The gate's product of feed-forward layers on CUDA, for one row of x.

It moves a few kilobytes, so that what counts is the time from launch to end; and it may leave its
output as integers to the layer after it, see `cuda_image`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairy_compile.kernels.base import Activation
from fairy_compile.kernels.cuda_image import image_bytes
from fairy_compile.kernels.cuda_source import CUDA_TYPES, lanes_of, read_files
from fairy_compile.kernels.elementwise_cpu import GELU_CUBIC, GELU_SCALE
from fairy_compile.op import ACT_LEVELS

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

GATE = "fairy.gate_product"
"""Attribute of `build_gate_product`'s functions, true, with those of its arguments:
`compiler.quantize_once` may ask for an image."""

_THREADS = 128
_ARGUMENTS: dict[Activation, str] = {
    "silu": "x",
    "gelu_tanh": f"x * (x * x * {GELU_CUBIC!r}f + 1.0f) * {GELU_SCALE!r}f",
}
"""What the logistic function of which times x is the activation."""


def serves(size: int, dtype: str) -> bool:
    """Tell whether rows of ``size`` outputs can be read 128 bits at a time."""
    return dtype in CUDA_TYPES and size % lanes_of(dtype) == 0


def render(activation: Activation, size: int, dtype: str, act: str | None) -> tuple[str, str]:
    """Return (name, CUDA C++) of a device function ``name(const X* x, void* y)``."""
    x = CUDA_TYPES[dtype]
    library = read_files("primitives.cuh", "quantize.cuh", "gate.cuh")
    name = f"gate_product_{activation}_{size}_{dtype}" + (f"_{act}" if act else "")
    source = f"""{library}
struct {name}_call {{
  typedef {x} X;
  static constexpr int kSize = {size};
  static constexpr int kThreads = {_THREADS};
  static constexpr int kLevels = {ACT_LEVELS[act] if act else 0};
  static __device__ __forceinline__ float activate(float x) {{
    return x / (1.0f + expf(-({_ARGUMENTS[activation]})));
  }}
}};

__device__ __forceinline__ void {name}(const {x}* x, void* y) {{
  fairy::GateProduct<{name}_call>::run(x, y);
}}
"""
    return name, source


def build_gate_product(
    activation: Activation, size: int, dtype: str, act: str | None = None
) -> PrimFunc:
    """Return ``gate_product``: y = activation(gate) * up of one row (gate, up).

    Arguments: x ``dtype`` (1, 2 size), y ``dtype`` (1, size). With ``act``, ``int16`` or ``int8``,
    y is an image of what it would be: uint8 (1, image_bytes(size / 2, act)).
    """
    from tvm.backend.cuda.op import cuda_func_call
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    name, source = render(activation, size, dtype, act)
    marks = {GATE: True, "activation": activation, "size": size, "dtype": dtype}
    units = size // lanes_of(dtype)
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        attrs = {"tirx.noalias": True, "tirx.is_scheduled": True}
        T.func_attr({**attrs, **(marks if act is None else {})})
        x = T.arg("x", T.buffer((1, 2 * size), dtype))
        if act is None:
            y = T.arg("y", T.buffer((1, size), dtype))
        else:
            y = T.arg("y", T.buffer((1, image_bytes(size // 2, act)), "uint8"))
        # A block, since Relax asks functions of one argument whether all they do is reshape it.
        with T.sblock("root"):
            T.reads(x[0 : x.shape[0], 0 : x.shape[1]])
            T.writes(y[0 : y.shape[0], 0 : y.shape[1]])
            with (
                T.thread_binding(0, -(-units // _THREADS), "blockIdx.x"),
                T.thread_binding(0, 1, "blockIdx.y"),
                T.thread_binding(0, _THREADS, "threadIdx.x"),
            ):
                T.evaluate(cuda_func_call(name, x.data, y.data, source_code=source))
        T.func_name(name)
    return ir.get()
