"""Functions of an engine that work on logits, on GPUs; see `models.engine_functions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import (
    THREADS,
    build_function,
    ceildiv,
    launch,
    local,
    reduce_group,
    store,
    strided,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc

_LOWEST = -3.4028234663852886e38


def build_softmax(greedy_temperature: float) -> PrimFunc:
    """Return ``softmax_with_temperature``, one thread group a row.

    Arguments: logits float32 (b, 1, v), temperature float32 (b,), y float32 (b, 1, v). Rows whose
    temperature is at most ``greedy_temperature`` get 1 / count on their maxima, 0 elsewhere.
    """

    def body() -> None:
        rows, vocab = T.int32(), T.int32()
        logits = T.arg("logits", T.buffer((rows, 1, vocab), "float32"))
        temperature = T.arg("temperature", T.buffer((rows,), "float32"))
        y = T.arg("y", T.buffer((rows, 1, vocab), "float32"))
        with launch({"blockIdx.x": rows, "threadIdx.x": THREADS}) as (row, thread):
            value = local((1,))
            store(value, 0, T.float32(_LOWEST))
            strided(
                vocab,
                thread,
                THREADS,
                lambda i: store(value, 0, T.max(value[0], logits[row, 0, i])),
            )
            peak = T.bind(reduce_group([value[0]], T.max, thread, THREADS)[0])
            soft = T.bind(temperature[row] > T.float32(greedy_temperature))
            inverse = T.bind(T.float32(1) / T.if_then_else(soft, temperature[row], T.float32(1)))

            def weight(i: Expr) -> Expr:
                logit = logits[row, 0, i]
                hard = T.if_then_else(logit == peak, T.float32(1), T.float32(0))
                return T.if_then_else(soft, T.exp((logit - peak) * inverse), hard)

            total = local((1,))
            store(total, 0, T.float32(0))
            strided(vocab, thread, THREADS, lambda i: store(total, 0, total[0] + weight(i)))
            whole = reduce_group([total[0]], lambda a, b: a + b, thread, THREADS)[0]
            scale = T.bind(T.float32(1) / whole)
            strided(vocab, thread, THREADS, lambda i: store(y, (row, 0, i), weight(i) * scale))

    return build_function("softmax_with_temperature", body).without_attr("global_symbol")


def _each(count: Expr, body: Callable[[Expr], None]) -> None:
    """Run body(i) on a thread of its own for each i below ``count``."""
    extents = {"blockIdx.x": ceildiv(count, THREADS), "threadIdx.x": THREADS}
    with launch(extents) as (block, thread):
        index = T.bind(block * THREADS + thread)
        with when(index < count):
            body(index)


def _logits_arg() -> tuple[Buffer, Expr, Expr]:
    rows, vocab = T.int32(), T.int32()
    return T.arg("logits", T.buffer((rows, vocab), "float32")), rows, vocab


def _vector_arg(name: str, count: Any, dtype: str = "int32") -> Buffer:
    return T.arg(name, T.buffer((count,), dtype))


def _logit_bias() -> None:
    logits, _, _ = _logits_arg()
    count = T.int32()
    row, token = _vector_arg("row", count), _vector_arg("token", count)
    bias = _vector_arg("bias", count, "float32")

    def add(i: Expr) -> None:
        at = (T.bind(row[i]), T.bind(token[i]))
        store(logits, at, logits[at] + bias[i])

    _each(count, add)


def _penalty() -> None:
    logits, _, _ = _logits_arg()
    sequences, count = T.int32(), T.int32()
    sequence = _vector_arg("sequence", sequences)
    position, token, times = (_vector_arg(n, count) for n in ("position", "token", "times"))
    # Columns: presence, frequency, repetition.
    penalty = T.arg("penalty", T.buffer((sequences, 3), "float32"))

    def apply(i: Expr) -> None:
        which = T.bind(position[i])
        at = (T.bind(sequence[which]), T.bind(token[i]))
        less = T.bind(
            logits[at] - (penalty[which, 0] + T.cast(times[i], "float32") * penalty[which, 1])
        )
        repetition = T.bind(penalty[which, 2])
        lower = T.if_then_else(less < T.float32(0), less * repetition, less / repetition)
        store(logits, at, lower)

    _each(count, apply)


def _bitmask() -> None:
    logits, rows, vocab = _logits_arg()
    sequences = T.int32()
    sequence = _vector_arg("sequence", sequences)
    mask = T.arg("mask", T.buffer((rows, (vocab + 31) // 32), "int32"))
    extents = {
        "blockIdx.y": sequences,
        "blockIdx.x": ceildiv(vocab, THREADS),
        "threadIdx.x": THREADS,
    }
    with launch(extents) as (index, block, thread):
        token = T.bind(block * THREADS + thread)
        with when(token < vocab):
            row = T.bind(sequence[index])
            word = mask[row, T.shift_right(token, T.int32(5))]
            bit = T.shift_right(word, T.bitwise_and(token, T.int32(31)))
            with when(T.bitwise_and(bit, T.int32(1)) == 0):
                store(logits, (row, token), T.float32(_LOWEST))


def inplace_functions() -> dict[str, PrimFunc]:
    """Return the three functions that edit logits (b, v) float32 in place.

    Entries of one call are edited by different threads, so that no two may name one logit.
    """
    bodies = {
        "apply_logit_bias_inplace": _logit_bias,
        "apply_penalty_inplace": _penalty,
        "apply_bitmask_inplace": _bitmask,
    }
    return {name: build_function(name, body) for name, body in bodies.items()}
