"""Prefill attention on CUDA in float16 tensor cores; TVM's kernels use none on float16 caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fairy_compile.kernels.attention_shape import PAGE, AttentionShape
from fairy_compile.kernels.cuda_attention import constants, suffix, window_arguments
from fairy_compile.kernels.cuda_source import read_files

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

_WARPS = 4
_ROWS = 16 * _WARPS
_MOST_DIM = 128  # outputs of a row are registers


def serves(shape: AttentionShape) -> bool:
    """Tell whether the kernel takes a cache: float16, heads of 32, 64, 96 or 128."""
    return shape.dtype == "float16" and shape.head_dim % 32 == 0 and shape.head_dim <= _MOST_DIM


def render(shape: AttentionShape, paged: bool) -> tuple[str, str]:
    """Return (name, CUDA C++) of a device function; see attention_prefill.cuh."""
    library = read_files("primitives.cuh", "attention_scores.cuh", "attention_prefill.cuh")
    kind = "paged" if paged else "ragged"
    name = f"attention_{kind}_{shape.heads}_{shape.kv_heads}_{shape.head_dim}{suffix(shape)}"
    parameters, arguments = window_arguments(shape)
    source = f"""{library}
#ifndef FAIRY_{name}
#define FAIRY_{name}
struct {name}_call {{
{constants(shape, kWarps=_WARPS, kPaged=int(paged))}
}};

__device__ __forceinline__ void {name}(const __half* q, const int* q_indptr, const __half* keys,
                                       const __half* values, const int* indptr,
                                       const int* page_values, const int* last_page,
                                       {parameters}__half* output, float* lse, float scale,
                                       int causal, int batch, int tiles) {{
  fairy::PrefillAttention<{name}_call>::run(q, q_indptr, keys, values, indptr, page_values,
                                            last_page, {arguments}output, lse, scale, causal,
                                            batch, tiles);
}}
#endif  // FAIRY_{name}
"""
    return name, source


def build_paged_prefill(shape: AttentionShape) -> PrimFunc:
    """Return ``batch_prefill_paged_kv`` as the runtime's KV cache calls it.

    Arguments: q (n, heads, head_dim), q_indptr int32 (b + 1,), pages (p, 2, kv_heads, 16,
    head_dim), page_indptr int32 (b + 1,), page_values int32, last_page_len int32 (b,),
    k_rope_pos_offset int32 (b,), q_rope_position int32 (n,), output like q, lse float32 (n, heads)
    in units of log2, causal, rotary_mode, rope_scale, rope_theta, sm_scale. ``causal`` aligns the
    last query with the last key.
    """
    return _build(shape, paged=True)


def build_ragged_prefill(shape: AttentionShape) -> PrimFunc:
    """Return ``batch_prefill_ragged_kv`` as the runtime's KV cache calls it.

    Arguments: q (n, heads, head_dim), q_indptr int32 (b + 1,), k and v (m, kv_heads, head_dim),
    kv_indptr int32 (b + 1,), q_rope_position int32 (n,), k_rope_pos_offset int32 (b,), and the rest
    as `build_paged_prefill`.
    """
    return _build(shape, paged=False)


def _build(shape: AttentionShape, *, paged: bool) -> PrimFunc:
    from tvm.backend.cuda.op import cuda_func_call
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from fairy_compile.kernels.attention_cpu_decode import index_buffer, rope_and_scale_args

    name, source = render(shape, paged)
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        total, batch = T.int32(), T.int32()
        rows = (total, shape.heads, shape.head_dim)
        q = T.arg("q", T.buffer(rows, shape.dtype))
        q_indptr = T.arg("q_indptr", index_buffer(batch + 1))
        if paged:
            page = (2, shape.kv_heads, PAGE, shape.head_dim)
            keys = values = T.arg("pages", T.buffer((T.int32(), *page), shape.dtype))
            indptr = T.arg("page_indptr", index_buffer(batch + 1))
            page_values = T.arg("page_values", index_buffer(T.int32()))
            last_page = T.arg("last_page_len", index_buffer(batch))
            offset = T.arg("k_rope_pos_offset", index_buffer(batch))
            position = T.arg("q_rope_position", index_buffer(total))
        else:
            new = (T.int32(), shape.kv_heads, shape.head_dim)
            keys, values = (T.arg(n, T.buffer(new, shape.dtype)) for n in "kv")
            indptr = T.arg("kv_indptr", index_buffer(batch + 1))
            page_values = last_page = indptr  # not read
            position = T.arg("q_rope_position", index_buffer(total))
            offset = T.arg("k_rope_pos_offset", index_buffer(batch))
        output = T.arg("output", T.buffer(rows, shape.dtype))
        lse = T.arg("lse", T.buffer((total, shape.heads), "float32"))
        causal = T.arg("causal", T.int32())
        scale = rope_and_scale_args() * T.float32(shape.score_unit)
        tables = [indptr, page_values, last_page]
        if shape.window is not None:
            tables += [offset, position]
        given: list[Any] = [T.address_of(b[0]) for b in tables]
        arguments = [q.data, T.address_of(q_indptr[0]), keys.data, values.data, *given]
        # At most this many tiles: a sequence's last one may be short.
        tiles = T.bind(T.truncdiv(total, T.int32(_ROWS)) + batch)
        arguments += [output.data, lse.data, scale, causal, batch, tiles]
        with (
            T.thread_binding(0, tiles, "blockIdx.x"),
            T.thread_binding(0, shape.heads, "blockIdx.y"),
            T.thread_binding(0, 32 * _WARPS, "threadIdx.x"),
        ):
            T.evaluate(cuda_func_call(name, *arguments, source_code=source))
    return ir.get()
