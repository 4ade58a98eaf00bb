"""PrimFuncs that launch CUDA device functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.cuda_layout import CudaLayout
from fairy_compile.op import PhaseSpec

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.kernels.cuda import Launch


def emit(
    spec: PhaseSpec,
    layout: CudaLayout,
    launches: Sequence[Launch],
    batch: Batch,
) -> PrimFunc:
    """Return a function (x, codes, scales, y) that launches the first grid meant for its rows."""
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = 1 if batch == "single" else T.int32()
        x = T.arg("x", T.buffer((rows, spec.in_features), spec.dtype))
        arrays = [T.arg(n, T.buffer(a.shape, a.dtype)) for n, a in layout.arrays(spec).items()]
        y = T.arg("y", T.buffer((rows, spec.out_features), spec.out_dtype))
        _launch_first(launches, rows, [buffer.data for buffer in (x, *arrays, y)])
        T.func_name(f"phase_gemm_{launches[-1].function}_{batch}")
    return ir.get()


def _launch_first(launches: Sequence[Launch], count: Any, pointers: list[Any]) -> None:
    first, *others = launches
    if first.most is None or not others:
        _launch(first, count, pointers)
        return
    with T.If(count <= first.most):
        with T.Then():
            _launch(first, count, pointers)
        with T.Else():
            _launch_first(others, count, pointers)


def _launch(launch: Launch, count: Any, pointers: list[Any]) -> None:
    passes = (count + launch.rows - 1) // launch.rows
    if launch.arrange:
        _launch_arranged(launch, passes, count, pointers)
        return
    with (
        T.thread_binding(0, launch.blocks, "blockIdx.x"),
        T.thread_binding(0, passes, "blockIdx.y"),
        T.thread_binding(0, launch.threads, "threadIdx.x"),
    ):
        call = cuda_func_call(launch.function, *pointers, count, source_code=launch.source)
        T.evaluate(call)


def _launch_arranged(launch: Launch, passes: Any, count: Any, pointers: list[Any]) -> None:
    arrange, (x, *others) = launch.arrange, pointers
    image = T.alloc_buffer((passes * arrange.image_bytes,), "uint8", scope="global")
    with (
        T.thread_binding(0, arrange.blocks, "blockIdx.x"),
        T.thread_binding(0, passes * (launch.rows // arrange.threads), "blockIdx.y"),
        T.thread_binding(0, arrange.threads, "threadIdx.x"),
    ):
        call = cuda_func_call(arrange.function, x, image.data, count, source_code=launch.source)
        T.evaluate(call)
    with (
        T.thread_binding(0, launch.blocks, "blockIdx.x"),
        T.thread_binding(0, passes, "blockIdx.y"),
        T.thread_binding(0, launch.threads, "threadIdx.x"),
    ):
        shared = T.alloc_buffer((launch.shared,), "uint8", scope="shared.dyn")
        arguments = (image.data, *others, count, shared.data)
        call = cuda_func_call(launch.function, *arguments, source_code=launch.source)
        T.evaluate(call)
