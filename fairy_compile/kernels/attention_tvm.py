"""Attention on GPUs: what TVM's kernels serve, and merging of partial attention.

TVM's attention kernels for GPUs are taken for what they cover, those of `attention_gpu_decode` and
`attention_gpu_prefill` for the rest. TVM's merge is replaced: it lets every thread of a head read
the log-sum-exp that one of them writes, which only threads in lockstep get away with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.relax.frontend.nn.llm import kv_cache as upstream
from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import build_function, launch, load_float, local, store, when

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.kernels.attention_shape import AttentionShape
    from fairy_compile.targets import Limits

_HEAD_DIM_STEP = 8


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


def serves(shape: AttentionShape) -> bool:
    """Tell whether TVM's kernels compute such attention: over all keys, of heads they do not cut.

    Their prefill reads past the end of heads that are no multiple of 8.
    """
    return shape.window is None and shape.softcap is None and shape.head_dim % _HEAD_DIM_STEP == 0


def covers_heads(decode: PrimFunc, heads: int, head_dim: int) -> bool:
    """Tell whether the threads of TVM's decode kernel cover all heads and elements.

    It halves the heads of a thread group until they are few enough, dropping odd ones, and gives
    each thread a number of elements that need not divide a head.
    """
    extents = thread_extents(decode)
    covered = extents["blockIdx.y"] * extents["threadIdx.y"]
    return covered == heads and head_dim % extents["threadIdx.x"] == 0


def fit_prefill(
    prefill: PrimFunc, ragged: bool, sizes: tuple[int, int, int, str], scaling: Any, limits: Limits
) -> PrimFunc | None:
    """Return a prefill kernel of TVM's that has its shared memory, None if no smaller tile fits.

    Args:
        prefill: the one for the target.
        ragged: whether keys are an array of their own, not pages of the cache.
        sizes: kv_heads, heads, head_dim, dtype of keys.
        scaling: rule of rotary embedding, as TVM wants it.
        limits: of the target.
    """
    if shared_bytes(prefill) <= limits.shared_bytes:
        return prefill
    # TVM shrinks tiles for this kind of target only; the functions are the same for all.
    keys = {
        "kind": "metal",
        "max_num_threads": limits.max_threads,
        "max_threads_per_block": limits.max_threads,
        "max_shared_memory_per_block": limits.shared_bytes,
    }
    kv_heads, heads, head_dim, dtype = sizes
    target = tvm.target.Target(keys)
    try:
        if ragged:
            return upstream._attention_prefill_ragged(
                kv_heads, heads, head_dim, head_dim, dtype, scaling, target
            )
        return upstream._attention_prefill(kv_heads, heads, head_dim, dtype, False, scaling, target)
    except ValueError:
        return None


def shared_bytes(function: PrimFunc) -> int:
    """Return the bytes of shared memory a scheduled function declares.

    TVM may let arrays share memory later, so that this is the most it can need.
    """
    total = 0

    def visit(block: Any, visitor: Any) -> None:
        nonlocal total
        for buffer in block.alloc_buffers:
            if buffer.scope() == "shared":
                elements = 1
                for size in buffer.ty.shape:
                    elements *= int(size)
                total += elements * tvm.runtime.DataType(buffer.ty.dtype).itemsize
        visitor.default_visit(block)

    tvm_ffi.structural_visit(function.body, [(tvm.s_tir.SBlock, visit)])
    return total


def thread_extents(function: PrimFunc) -> dict[str, int]:
    """Return thread tag -> extent of a scheduled function; symbolic ones are left out."""
    extents: dict[str, int] = {}

    def visit(loop: Any, visitor: Any) -> None:
        if loop.thread_binding is not None and isinstance(loop.extent, tirx.IntImm):
            extents[str(loop.thread_binding.thread_tag)] = int(loop.extent)
        visitor.default_visit(loop)

    tvm_ffi.structural_visit(function.body, [(tirx.For, visit)])
    return extents
