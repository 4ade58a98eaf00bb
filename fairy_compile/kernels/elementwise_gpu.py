"""Norms on GPUs: one thread group a row, sums in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.gpu_builder import (
    THREADS,
    build_function,
    launch,
    load_float,
    local,
    reduce_group,
    store,
    strided,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import PrimFunc


def build_rms_norm(size: int, eps: float, dtype: str, batch: Batch) -> PrimFunc:
    """Return ``rms_norm``: y = x / sqrt(mean(x²) + eps) * weight, row by row.

    Arguments: x ``dtype`` (b, size), weight float32 (size,), y ``dtype`` (b, size). Zhang and
    Sennrich, arXiv 1910.07467, equation 4.
    """
    threads = min(THREADS, 1 << max(0, (size - 1).bit_length()))

    def body() -> None:
        rows = 1 if batch == "single" else T.int32()
        x = T.arg("x", T.buffer((rows, size), dtype))
        weight = T.arg("weight", T.buffer((size,), "float32"))
        y = T.arg("y", T.buffer((rows, size), dtype))
        with launch({"blockIdx.x": rows, "threadIdx.x": threads}) as (row, thread):
            squares = local((1,))
            store(squares, 0, T.float32(0))

            def add(i: object) -> None:
                value = T.bind(load_float(x, row, i))
                store(squares, 0, squares[0] + value * value)

            strided(size, thread, threads, add)
            total = reduce_group([squares[0]], lambda a, b: a + b, thread, threads)[0]
            factor = T.bind(T.float32(1) / T.sqrt(total / T.float32(size) + T.float32(eps)))

            def scale(i: object) -> None:
                value = load_float(x, row, i) * factor * weight[i]
                store(y, (row, i), T.cast(value, dtype))

            strided(size, thread, threads, scale)

    return build_function("rms_norm", body).without_attr("global_symbol")


def build_layer_norm(size: int, eps: float, dtype: str, batch: Batch, *, scaled: bool) -> PrimFunc:
    """Return ``layer_norm``: y = (x - mean) / sqrt(variance + eps) [* weight + bias], row by row.

    Arguments: x ``dtype`` (b, size); weight and bias float32 (size,) if ``scaled``; y ``dtype`` (b,
    size). Ba, Kiros and Hinton, arXiv 1607.06450.
    """
    threads = min(THREADS, 1 << max(0, (size - 1).bit_length()))

    def body() -> None:
        rows = 1 if batch == "single" else T.int32()
        x = T.arg("x", T.buffer((rows, size), dtype))
        names = ("weight", "bias") if scaled else ()
        parameters = [T.arg(name, T.buffer((size,), "float32")) for name in names]
        y = T.arg("y", T.buffer((rows, size), dtype))
        with launch({"blockIdx.x": rows, "threadIdx.x": threads}) as (row, thread):

            def mean_of(value: Callable[[Expr], Expr]) -> Expr:
                total = local((1,))
                store(total, 0, T.float32(0))
                strided(
                    size, thread, threads, lambda i: store(total, 0, total[0] + T.bind(value(i)))
                )
                sums = reduce_group([total[0]], lambda a, b: a + b, thread, threads)
                return T.bind(sums[0] / T.float32(size))

            mean = mean_of(lambda i: load_float(x, row, i))

            def square(i: Expr) -> Expr:
                difference = T.bind(load_float(x, row, i) - mean)
                return difference * difference

            factor = T.bind(T.float32(1) / T.sqrt(mean_of(square) + T.float32(eps)))

            def scale(i: Expr) -> None:
                value = (load_float(x, row, i) - mean) * factor
                if parameters:
                    value = value * parameters[0][i] + parameters[1][i]
                store(y, (row, i), T.cast(value, dtype))

            strided(size, thread, threads, scale)

    return build_function("layer_norm", body).without_attr("global_symbol")
