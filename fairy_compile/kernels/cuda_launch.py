"""PrimFuncs that launch CUDA device functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    attrs: Mapping[str, Any] | None = None,
    *,
    scratch: bool = False,
) -> PrimFunc:
    """Return a function (x, codes, scales, y) that launches the first grid meant for its rows.

    Launches that take an image of x and have no grid that makes it take it as argument
    ``image`` uint8 (rows, bytes) in place of x. With ``scratch``, the function takes the memory of
    those images that it makes as a last argument, uint8 (bytes,), and allocates none.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, **(attrs or {})})
        rows = 1 if batch == "single" else T.int32()
        if launches[0].takes_image:
            row_bytes = launches[0].image_bytes // launches[0].rows
            x = T.arg("image", T.buffer((rows, row_bytes), "uint8"))
        else:
            x = T.arg("x", T.buffer((rows, spec.in_features), spec.dtype))
        arrays = [T.arg(n, T.buffer(a.shape, a.dtype)) for n, a in layout.arrays(spec).items()]
        y = T.arg("y", T.buffer((rows, spec.out_features), spec.out_dtype))
        memory = T.arg("scratch", T.buffer((T.int64(),), "uint8")) if scratch else None
        _launch_first(launches, rows, [buffer.data for buffer in (x, *arrays, y)], memory)
        T.func_name(f"phase_gemm_{launches[-1].function}_{batch}")
    return ir.get()


def _launch_first(
    launches: Sequence[Launch], count: Any, pointers: list[Any], scratch: Any
) -> None:
    first, *others = launches
    if first.most is None or not others:
        _launch(first, count, pointers, scratch)
        return
    with T.If(count <= first.most):
        with T.Then():
            _launch(first, count, pointers, scratch)
        with T.Else():
            _launch_first(others, count, pointers, scratch)


def _launch(launch: Launch, count: Any, pointers: list[Any], scratch: Any) -> None:
    passes = (count + launch.rows - 1) // launch.rows
    if launch.arrange:
        image = scratch
        if image is None:
            image = T.alloc_buffer((passes * launch.image_bytes,), "uint8", scope="global")
        _arrange(launch, passes, count, pointers[0], image)
        pointers = [image.data, *pointers[1:]]
    with (
        T.thread_binding(0, launch.blocks, "blockIdx.x"),
        T.thread_binding(0, passes, "blockIdx.y"),
        T.thread_binding(0, launch.threads, "threadIdx.x"),
    ):
        arguments = [*pointers, count]
        if launch.image_bytes:
            arguments.append(T.alloc_buffer((launch.shared,), "uint8", scope="shared.dyn").data)
        T.evaluate(cuda_func_call(launch.function, *arguments, source_code=launch.source))


def _arrange(launch: Launch, passes: Any, count: Any, x: Any, image: Any) -> None:
    arrange = launch.arrange
    with (
        T.thread_binding(0, arrange.blocks, "blockIdx.x"),
        T.thread_binding(0, passes * (launch.rows // arrange.rows), "blockIdx.y"),
        T.thread_binding(0, arrange.threads, "threadIdx.x"),
    ):
        call = cuda_func_call(arrange.function, x, image.data, count, source_code=launch.source)
        T.evaluate(call)
