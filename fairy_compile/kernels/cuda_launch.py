"""PrimFuncs that launch CUDA device functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.cuda_layout import CudaLayout
from fairy_compile.op import PhaseSpec

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.kernels.cuda_grid import Launch


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
    what launches leave to each other as a last argument, uint8 (bytes,), and allocates none.
    """
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, **(attrs or {})})
        rows = 1 if batch == "single" else T.int32()
        if launches[0].takes_image:
            row_bytes = launches[0].image_bytes // launches[0].rows
            x = T.arg("image", T.buffer((rows, row_bytes), "uint8"))
        else:
            x = T.arg("x", T.buffer((rows, spec.in_features), spec.dtype))
        arrays = _weights(spec, layout)
        y = T.arg("y", T.buffer((rows, spec.out_features), spec.out_dtype))
        memory = T.arg("scratch", T.buffer((T.int64(),), "uint8")) if scratch else None
        launch_first(launches, rows, [buffer.data for buffer in (x, *arrays, y)], memory)
        T.func_name(f"phase_gemm_{launches[-1].function}_{batch}")
    return ir.get()


def emit_normed(spec: PhaseSpec, layout: CudaLayout, launch: Launch, *, add: bool) -> PrimFunc:
    """Return a function that launches a grid that normalises its row: `CudaPlanes.build_normed`."""
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        x = T.arg("x", T.buffer((1, spec.in_features), spec.dtype))
        other = T.arg("other", T.buffer((1, spec.in_features), spec.dtype)) if add else x
        weight = T.arg("weight", T.buffer((spec.in_features,), "float32"))
        arrays = _weights(spec, layout)
        total = T.arg("sum", T.buffer((1, spec.in_features), spec.dtype)) if add else x
        y = T.arg("y", T.buffer((1, spec.out_features), spec.out_dtype))
        pointers = [buffer.data for buffer in (x, other, weight, *arrays, total, y)]
        with _threads({"blockIdx.x": launch.blocks, "threadIdx.x": launch.threads}):
            T.evaluate(cuda_func_call(launch.function, *pointers, 1, source_code=launch.source))
        T.func_name(f"phase_gemm_{launch.function}_single")
    return ir.get()


def _weights(spec: PhaseSpec, layout: CudaLayout) -> list[Any]:
    """Declare the arguments between x and y."""
    arrays = [T.arg(n, T.buffer(a.shape, a.dtype)) for n, a in layout.arrays(spec).items()]
    if spec.bias:
        arrays.append(T.arg("bias", T.buffer((spec.out_features,), "float32")))
    return arrays


def launch_first(
    launches: Sequence[Launch], count: Any, pointers: list[Any], scratch: Any = None
) -> None:
    """Emit the first launch meant for ``count`` rows of x.

    Args:
        launches: by rising number of rows.
        count: rows of x.
        pointers: of the function's arrays: x, codes, scales, a bias if there is one, y.
        scratch: memory for what grids leave to each other; None lets launches allocate it.
    """
    first, *others = launches
    if first.most is None or not others:
        _launch(first, count, pointers, scratch)
        return
    with T.If(count <= first.most):
        with T.Then():
            _launch(first, count, pointers, scratch)
        with T.Else():
            launch_first(others, count, pointers, scratch)


def _launch(launch: Launch, count: Any, pointers: list[Any], scratch: Any) -> None:
    passes = (count + launch.rows - 1) // launch.rows
    x, codes, scales, *bias, y = pointers
    if launch.scratch_bytes:
        if scratch is None:
            size = passes * launch.scratch_bytes
            scratch = T.alloc_buffer((size,), "uint8", scope="global")
        if launch.arrange:
            _arrange(launch, passes, count, x, scratch)
            x = scratch.data
    extents = {"blockIdx.x": launch.blocks, "blockIdx.y": passes}
    if launch.splits > 1:
        extents["blockIdx.z"] = launch.splits
    with _threads({**extents, "threadIdx.x": launch.threads}):
        out = y if launch.splits == 1 else scratch.data
        arguments = [x, codes, scales, *bias, out, count]
        if launch.image_bytes:
            arguments.append(T.alloc_buffer((launch.shared,), "uint8", scope="shared.dyn").data)
        T.evaluate(cuda_func_call(launch.function, *arguments, source_code=launch.source))
    if launch.add:
        add = launch.add
        extents = {"blockIdx.x": add.blocks, "blockIdx.y": count, "threadIdx.x": add.threads}
        with _threads(extents):
            arguments = [scratch.data, *bias, y, count]
            call = cuda_func_call(add.function, *arguments, source_code=launch.source)
            T.evaluate(call)


@contextmanager
def _threads(extents: Mapping[str, Any]) -> Iterator[None]:
    """Open a launch."""
    with ExitStack() as stack:
        for tag, extent in extents.items():
            stack.enter_context(T.thread_binding(0, extent, tag))
        yield


def _arrange(launch: Launch, passes: Any, count: Any, x: Any, image: Any) -> None:
    arrange = launch.arrange
    extents = {
        "blockIdx.x": arrange.blocks,
        "blockIdx.y": passes * (launch.rows // arrange.rows),
        "threadIdx.x": arrange.threads,
    }
    with _threads(extents):
        call = cuda_func_call(arrange.function, x, image.data, count, source_code=launch.source)
        T.evaluate(call)
