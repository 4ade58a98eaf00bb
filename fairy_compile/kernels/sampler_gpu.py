"""What an engine's GPU sampler calls beside `sort_gpu`: draws and nucleus (top-p) renormalisation.

Probabilities are float32 (b, v) and need not sum to 1 exactly: draws are scaled by their sums as
the kernels find them. One thread group works on one row. Signatures: `artifact.contract`.
"""

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
    shared,
    store,
    strided,
    when,
)

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import PrimFunc

# Binary digits of a pivot that one pass over the row decides.
_DIGITS = 2
# A probability of at most 1 has the bits of a float from 0 to 0x3f800000.
_PIVOT_BITS = 30


def build_multinomial() -> PrimFunc:
    """Return ``multinomial_from_uniform``: the token at which the cumulative sum passes u.

    Arguments: probs (b, v), u (s,), row int32 (s,), y int32 (s,).
    """

    def body() -> None:
        rows, vocab, samples = T.int32(), T.int32(), T.int32()
        probs = T.arg("probs", T.buffer((rows, vocab), "float32"))
        uniform = T.arg("uniform", T.buffer((samples,), "float32"))
        row_of = T.arg("row_of", T.buffer((samples,), "int32"))
        y = T.arg("y", T.buffer((samples,), "int32"))
        with launch({"blockIdx.x": samples, "threadIdx.x": THREADS}) as (sample, thread):
            row = T.bind(row_of[sample])
            scan = _Scan(lambda i: probs[row, i], vocab, thread)
            scan.find(scan.total * uniform[sample], lambda i: store(y, sample, i))

    return build_function("multinomial_from_uniform", body).without_attr("global_symbol")


def build_sample_top_p() -> PrimFunc:
    """Return ``sample_with_top_p``: a draw from the likeliest tokens that make up ``top_p``.

    A token is kept while the probabilities before it sum to less than ``top_p``. Arguments:
    sorted_probs (b, v) descending, sorted_index int32 (b, v), u (s,), row int32 (s,), top_p (b,),
    y int32 (s,).
    """

    def body() -> None:
        rows, vocab, samples = T.int32(), T.int32(), T.int32()
        probs = T.arg("sorted_probs", T.buffer((rows, vocab), "float32"))
        index = T.arg("sorted_index", T.buffer((rows, vocab), "int32"))
        uniform = T.arg("uniform", T.buffer((samples,), "float32"))
        row_of = T.arg("row_of", T.buffer((samples,), "int32"))
        top_p = T.arg("top_p", T.buffer((rows,), "float32"))
        y = T.arg("y", T.buffer((samples,), "int32"))
        with launch({"blockIdx.x": samples, "threadIdx.x": THREADS}) as (sample, thread):
            row = T.bind(row_of[sample])
            scan = _Scan(lambda i: probs[row, i], vocab, thread)
            kept = shared((1,))
            with when(thread == 0):
                store(kept, 0, scan.total)
            scan.reach(top_p[row], lambda so_far: store(kept, 0, so_far))
            limit = T.bind(kept[0])
            scan.find(limit * uniform[sample], lambda i: store(y, sample, index[row, i]))

    return build_function("sample_with_top_p", body).without_attr("global_symbol")


class _Scan:
    """Cumulative sums of a row: every thread owns a run of neighbours and knows what is before.

    Attributes:
        total: sum of the row, the same in every thread.
    """

    def __init__(self, value: Callable[[Any], Any], count: Expr, thread: Expr) -> None:
        self.value, self.count = value, count
        run = T.bind(ceildiv(count, THREADS))
        self.first = T.bind(T.min(thread * run, count))
        self.end = T.bind(T.min(self.first + run, count))
        self.sum = local((1,))
        self.thread = thread
        store(self.sum, 0, T.float32(0))
        self._each(lambda i: store(self.sum, 0, self.sum[0] + value(i)))
        own, sums = shared((THREADS,)), shared((THREADS + 1,))
        store(own, thread, self.sum[0])
        with when(thread == 0):
            # Summed in order, so that no later sum is below an earlier one.
            store(self.sum, 0, T.float32(0))
            store(sums, 0, T.float32(0))
            with T.serial(0, THREADS) as i:
                store(self.sum, 0, self.sum[0] + own[i])
                store(sums, i + 1, self.sum[0])
        self.before, self.after = T.bind(sums[thread]), T.bind(sums[thread + 1])
        self.total = T.bind(sums[THREADS])

    def _each(self, body: Callable[[Any], None]) -> None:
        with T.serial(0, self.end - self.first) as step:
            body(self.first + step)

    def reach(self, limit: Expr, found: Callable[[Expr], None]) -> None:
        """Call found(sum) in the thread where the sum comes to ``limit`` or more, if it does."""
        with when(T.And(self.before < limit, self.after >= limit)):
            store(self.sum, 0, self.before)

            def step(i: Expr) -> None:
                with when(self.sum[0] < limit):
                    store(self.sum, 0, self.sum[0] + self.value(i))

            self._each(step)
            found(self.sum[0])

    def find(self, limit: Expr, found: Callable[[Expr], None]) -> None:
        """Call found(i) in one thread, i being the first element with a sum above ``limit``.

        Where rounding leaves no such element, it is the last one that is not 0.
        """
        limit = T.bind(limit)
        memory = shared((THREADS,), "int32")
        best = local((1,), "int32")
        # The last element of this thread's run that is not 0 and begins below the limit, or -1.
        store(best, 0, T.int32(-1))
        store(self.sum, 0, self.before)

        def step(i: Expr) -> None:
            value = T.bind(self.value(i))
            with when(T.And(value > T.float32(0), self.sum[0] <= limit)):
                store(best, 0, i)
            store(self.sum, 0, self.sum[0] + value)

        self._each(step)
        store(memory, self.thread, best[0])
        with when(self.thread == 0):
            with T.serial(0, THREADS) as i:
                candidate = T.bind(memory[i])
                with when(candidate >= 0):
                    store(best, 0, candidate)
            found(T.max(best[0], T.int32(0)))


def build_renormalize_top_p() -> PrimFunc:
    """Return ``renormalize_by_top_p``: probabilities of the likeliest tokens, scaled to sum to 1.

    Kept are all tokens at least as likely as the least likely of the fewest that make up ``top_p``.
    That pivot is found digit by digit of its bit pattern, whose order is that of the numbers.
    Arguments: probs (b, v), top_p (b,), initial pivots (b, 3), which are not needed, y (b, v).
    """
    pivots = (1 << _DIGITS) - 1

    def body() -> None:
        rows, vocab = T.int32(), T.int32()
        probs = T.arg("probs", T.buffer((rows, vocab), "float32"))
        top_p = T.arg("top_p", T.buffer((rows,), "float32"))
        T.arg("initial_pivots", T.buffer((rows, 3), "float32"))
        y = T.arg("y", T.buffer((rows, vocab), "float32"))
        with launch({"blockIdx.x": rows, "threadIdx.x": THREADS}) as (row, thread):
            pivot, sums = local((1,), "uint32"), local((pivots,))
            kept = local((1,))

            def sum_above(count: int, candidate: Callable[[int], Any]) -> list[Any]:
                for k in range(count):
                    store(sums, k, T.float32(0))
                bounds = [T.bind(T.reinterpret("float32", candidate(k))) for k in range(count)]

                def add(i: Expr) -> None:
                    value = T.bind(probs[row, i])
                    for k, bound in enumerate(bounds):
                        with when(value >= bound):
                            store(sums, k, sums[k] + value)

                strided(vocab, thread, THREADS, add)
                values = [sums[k] for k in range(count)]
                return reduce_group(values, lambda a, b: a + b, thread, THREADS)

            store(pivot, 0, T.uint32(0))
            # Of a sum that rounding leaves below top_p, all tokens are kept.
            limit = T.bind(top_p[row])
            with T.serial(0, _PIVOT_BITS // _DIGITS) as digit:
                shift = T.cast(_PIVOT_BITS - _DIGITS - digit * _DIGITS, "uint32")
                step = T.bind(T.shift_left(T.uint32(1), shift))
                start = T.bind(pivot[0])
                found = sum_above(pivots, lambda k: start + T.uint32(k + 1) * step)
                for k in range(pivots):  # sums fall with k, so the last that is enough wins
                    with when(found[k] >= limit):
                        store(pivot, 0, start + T.uint32(k + 1) * step)
            final = T.bind(pivot[0])
            total = sum_above(1, lambda _: final)[0]
            store(kept, 0, T.float32(1) / total)
            bound = T.bind(T.reinterpret("float32", final))

            def write(i: Expr) -> None:
                value = T.bind(probs[row, i])
                store(
                    y,
                    (row, i),
                    T.if_then_else(value >= bound, value * kept[0], T.float32(0)),
                )

            strided(vocab, thread, THREADS, write)

    return build_function("renormalize_by_top_p", body).without_attr("global_symbol")


def build_take_probs() -> PrimFunc:
    """Return ``sampler_take_probs``: probabilities of drawn tokens and of the likeliest ones.

    Arguments: probs (b, v), sorted_index int32 (b, v), row int32 (s,), token int32 (s,), offset
    int32 (k,) = row * v + rank; y (s,), top_probs (k,), top_index int32 (k,).
    """

    def body() -> None:
        rows, vocab, samples, count = (T.int32() for _ in range(4))
        probs = T.arg("probs", T.buffer((rows, vocab), "float32"))
        index = T.arg("sorted_index", T.buffer((rows, vocab), "int32"))
        row_of = T.arg("row_of", T.buffer((samples,), "int32"))
        token = T.arg("token", T.buffer((samples,), "int32"))
        offset = T.arg("offset", T.buffer((count,), "int32"))
        y = T.arg("y", T.buffer((samples,), "float32"))
        top_probs = T.arg("top_probs", T.buffer((count,), "float32"))
        top_index = T.arg("top_index", T.buffer((count,), "int32"))
        groups = ceildiv(T.max(samples, count), THREADS)
        with launch({"blockIdx.x": groups, "threadIdx.x": THREADS}) as (block, thread):
            i = T.bind(block * THREADS + thread)
            with when(i < samples):
                store(y, i, probs[row_of[i], token[i]])
            with when(i < count):
                row = T.bind(T.floordiv(offset[i], vocab))
                at = T.bind(index[row, offset[i] - row * vocab])
                store(top_probs, i, probs[row, at])
                store(top_index, i, at)

    return build_function("sampler_take_probs", body).without_attr("global_symbol")
