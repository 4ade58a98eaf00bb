"""Mixtures of experts on GPUs: routing, and sorting rows by expert.

Arguments and meaning are those of `experts_cpu`. Neither function needs the other's order of
threads: every thread works out from shared memory where its own results go, so that there are no
atomic operations and results do not depend on who comes first. Products with the chosen experts are
those of the kernels for single matrices, over the rows of `gpu_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.gpu_builder import (
    THREADS,
    build_function,
    ceildiv,
    launch,
    local,
    reduce_group,
    shared,
    store,
    strided,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

_LOWEST = -3.4028234663852886e38
_MAGNITUDE = 0x7FFFFFFF  # bits of a float without its sign
# Threads of a group that work on a row of few elements.
_FEW = 32


def build_route(experts: int, chosen: int, normalize: bool, batch: Batch) -> PrimFunc:
    """Return ``route``, see `experts_cpu.build_route`; one thread group a row.

    An expert's place among the chosen is the number of experts that come before it, which is a
    different one for each: logits are compared as integers, whose order is total, with NaN of
    positive sign above infinity. So ids lie in range, and no two of a row are the same, whatever
    the logits. Where one is NaN, so are all weights of its row.
    """
    threads = min(THREADS, max(_FEW, 1 << (experts - 1).bit_length()))

    def body() -> None:
        rows: Any = 1 if batch == "single" else T.int32()
        logits = T.arg("logits", T.buffer((rows, experts), "float32"))
        weights = T.arg("weights", T.buffer((rows, chosen), "float32"))
        ids = T.arg("ids", T.buffer((rows, chosen), "int32"))
        with launch({"blockIdx.x": rows, "threadIdx.x": threads}) as (row, thread):
            keys, kept = shared((experts,), "int32"), shared((chosen,))
            peak, total = local((1,)), local((1,))
            store(peak, 0, T.float32(_LOWEST))
            store(total, 0, T.float32(0))

            def read(e: Expr) -> None:
                store(keys, e, _ordered(logits[row, e]))
                store(peak, 0, T.max(peak[0], logits[row, e]))

            strided(experts, thread, threads, read)
            (highest,) = reduce_group([peak[0]], T.max, thread, threads)

            def add(e: Expr) -> None:
                store(total, 0, total[0] + T.exp(logits[row, e] - highest))

            strided(experts, thread, threads, add)
            (whole,) = reduce_group([total[0]], lambda a, b: a + b, thread, threads)
            before = local((1,), "int32")

            def place(e: Expr) -> None:
                store(before, 0, T.int32(0))
                with T.serial(0, experts) as other:
                    earlier = T.Or(keys[other] > keys[e], T.And(keys[other] == keys[e], other < e))
                    store(before, 0, before[0] + T.if_then_else(earlier, 1, 0))
                with when(before[0] < chosen):
                    store(ids, (row, before[0]), e)
                    store(kept, before[0], T.exp(logits[row, e] - highest) / whole)

            strided(experts, thread, threads, place)

            def write(k: Expr) -> None:
                if not normalize:
                    store(weights, (row, k), kept[k])
                    return
                store(total, 0, T.float32(0))
                with T.serial(0, chosen) as other:
                    store(total, 0, total[0] + kept[other])
                store(weights, (row, k), kept[k] / total[0])

            strided(chosen, thread, threads, write)

    return build_function("route", body).without_attr("global_symbol")


def _ordered(value: Expr) -> Expr:
    """Return an int32 that is ordered as float32 are; both zeros are equal."""
    bits = T.reinterpret("int32", value)
    magnitude = T.bitwise_and(bits, T.int32(_MAGNITUDE))
    return T.if_then_else(bits >= 0, bits, 0 - magnitude)


def build_group(experts: int, chosen: int, batch: Batch) -> PrimFunc:
    """Return ``group``, see `experts_cpu.build_group`; one thread group an expert.

    Its threads have runs of neighbouring pairs. They count those of the expert and of experts
    before it, and then know where the first of their own goes.
    """
    threads = _FEW if batch == "single" else THREADS

    def body() -> None:
        rows: Any = 1 if batch == "single" else T.int32()
        ids = T.arg("ids", T.buffer((rows, chosen), "int32"))
        starts = T.arg("starts", T.buffer((experts + 1,), "int32"))
        order = T.arg("order", T.buffer((rows * chosen,), "int32"))
        places = T.arg("places", T.buffer((rows, chosen), "int32"))
        with launch({"blockIdx.x": experts, "threadIdx.x": threads}) as (expert, thread):
            count = T.bind(rows * chosen)
            run = T.bind(ceildiv(count, threads))
            first = T.bind(T.min(thread * run, count))
            length = T.bind(T.min(run, count - first))
            _place_pairs(
                (expert, thread, threads), (first, length), (ids, starts, order, places), chosen
            )
            with when(T.And(expert == experts - 1, thread == 0)):
                store(starts, experts, count)

    return build_function("group", body).without_attr("global_symbol")


def _place_pairs(
    at: tuple[Expr, Expr, int],
    run: tuple[Expr, Expr],
    buffers: tuple[Buffer, Buffer, Buffer, Buffer],
    chosen: int,
) -> None:
    """Write the places of an expert's pairs, each thread those of its run, and ``starts``.

    Args:
        at: expert, thread and number of threads.
        run: first pair of the thread's run, and how many it has.
        buffers: ids, starts, order and places of `build_group`.
        chosen: pairs of a token.
    """
    expert, thread, threads = at
    first, length = run
    ids, starts, order, places = buffers
    own, lower = local((1,), "int32"), local((1,), "int32")
    store(own, 0, T.int32(0))
    store(lower, 0, T.int32(0))

    def id_of(pair: Expr) -> Expr:
        return T.bind(ids[T.floordiv(pair, chosen), T.floormod(pair, chosen)])

    with T.serial(0, length) as i:
        found = id_of(first + i)
        store(own, 0, own[0] + T.if_then_else(found == expert, 1, 0))
        store(lower, 0, lower[0] + T.if_then_else(found < expert, 1, 0))
    counts = shared((threads,), "int32")
    store(counts, thread, own[0])
    (start,) = reduce_group([lower[0]], lambda a, b: a + b, thread, threads, "int32")
    with when(thread == 0):
        store(starts, expert, start)
    place = local((1,), "int32")
    store(place, 0, start)
    with T.serial(0, thread) as i:
        store(place, 0, place[0] + counts[i])
    with T.serial(0, length) as i:
        pair = T.bind(first + i)
        with when(id_of(pair) == expert):
            store(order, place[0], pair)
            store(places, (T.floordiv(pair, chosen), T.floormod(pair, chosen)), place[0])
            store(place, 0, place[0] + 1)
