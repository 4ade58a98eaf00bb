"""Merging partial attention on GPUs.

The other attention kernels of GPUs are TVM's. Its merge lets every thread of a head read the
log-sum-exp that one of them writes, which only threads in lockstep get away with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import build_function, launch, load_float, local, store, when

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc


def build_merge(heads: int, head_dim: int, dtype: str, max_threads: int) -> PrimFunc:
    """Return ``merge_state``: attention over two sets of keys from attention over each, in place.

    Arguments: v ``dtype`` (n, heads, head_dim), s float32 (n, heads), and other v and s; s is the
    log2 of the sum of exponentials. v and s become those of all keys.
    """
    threads = min(head_dim, max_threads)

    def body() -> None:
        tokens = T.int32()
        shape = (tokens, heads, head_dim)
        v = T.arg("v", T.buffer(shape, dtype))
        s = T.arg("s", T.buffer(shape[:2], "float32"))
        v_other = T.arg("v_other", T.buffer(shape, dtype))
        s_other = T.arg("s_other", T.buffer(shape[:2], "float32"))
        extents = {"blockIdx.y": tokens, "blockIdx.x": heads, "threadIdx.x": threads}
        with launch(extents) as (token, head, thread):
            state = local((2,))
            store(state, 0, s[token, head])
            store(state, 1, s_other[token, head])
            # All threads have read before one writes.
            T.evaluate(T.tvm_storage_sync("shared"))
            peak = T.bind(T.max(state[0], state[1]))
            own = T.bind(T.exp2(state[0] - peak))
            other = T.bind(T.exp2(state[1] - peak))
            total = T.bind(own + other)
            with T.serial(0, -(-head_dim // threads)) as turn:
                i = T.bind(turn * threads + thread)
                with when(i < head_dim):
                    at = (token, head, i)
                    merged = load_float(v, *at) * own + load_float(v_other, *at) * other
                    store(v, at, T.cast(merged / total, dtype))
            with when(thread == 0):
                store(s, (token, head), T.log2(total) + peak)

    return build_function("merge_state", body).without_attr("global_symbol")
