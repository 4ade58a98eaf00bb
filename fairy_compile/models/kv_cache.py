"""The paged KV cache of a model: how it is created, and attention over it.

The cache is the runtime's (`vm.builtin.paged_attention_kv_cache_create`), which manages sequences
and pages; the functions it calls to work on them are `kernels.attention_cpu`'s. It demands one
dtype for pages and for everything that goes in and comes out, so a float16 cache means that queries
and outputs are rounded to float16 as well. Arithmetic in between is float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, PagedKVCache, RopeMode

from fairy_compile.kernels import attention_cpu as kernels

if TYPE_CHECKING:
    from fairy_compile.models.config import DecoderConfig
    from fairy_compile.targets import Target

CREATE = "create_tir_paged_kv_cache"
_FLOAT16_MAX = 65504.0


def attend(cache: PagedKVCache, layer: int, qkv: Tensor, config: DecoderConfig) -> Tensor:
    """Append new keys and values to the cache and attend over it, with rotary embedding.

    Args:
        cache: the cache, in ``config.kv_dtype``.
        layer: which layer's pages.
        qkv: float32 (b, s, heads + 2 kv_heads, head_dim).
        config: sizes of the model.

    Returns:
        float32 (b, s, heads, head_dim).
    """
    if config.kv_dtype == "float16":
        qkv = op.tensor_expr_op(_to_float16, "to_float16", [qkv])
    scale = config.attention_scale or config.head_dim**-0.5
    y = cache.attention_with_fused_qkv(layer, qkv, config.num_heads, sm_scale=scale)
    return y if config.kv_dtype == "float32" else y.astype("float32")


def _to_float16(x: te.Tensor) -> te.Tensor:
    """Round to float16, saturating: an infinity would make NaNs of a whole row."""

    def convert(*at: Any) -> Any:
        return tirx.Cast("float16", te.max(te.min(x[at], _FLOAT16_MAX), -_FLOAT16_MAX))

    return te.compute(x.shape, convert, name="to_float16")


def add_kv_cache(bb: relax.BlockBuilder, config: DecoderConfig, target: Target) -> None:
    """Add ``create_tir_paged_kv_cache`` to the module under construction.

    It takes five shapes of one element: sequences, total tokens, prefill chunk, page size (16), and
    whether sliding windows are used (0: the kernels refuse them).
    """
    names = ("max_sequences", "max_total_tokens", "prefill_chunk", "page_size", "sliding_window")
    sizes = [tirx.Var(name, "int64") for name in names]
    params = [relax.Var(f"{v.name}_", relax.ShapeType([v])) for v in sizes]
    rope = config.rope
    with bb.function(CREATE, params=params):
        prim = relax.prim_value
        arguments = [
            # TVM 0.27 takes a sixth size, for layers with sliding windows; 0.26 refuses it.
            relax.ShapeExpr(sizes),
            relax.ShapeExpr([0, config.num_layers]),
            prim(config.num_heads),
            prim(config.num_kv_heads),
            prim(config.head_dim),
            prim(config.head_dim),
            relax.ShapeExpr([int(AttnKind.MHA)] * config.num_layers),
            prim(False),  # no disaggregation
            prim(int(RopeMode.NORMAL)),
            prim(rope.scale),
            prim(rope.theta),
            prim(0),  # no rope extension factors
            relax.op.zeros((), config.kv_dtype),
            *_functions(bb, config, target),
        ]
        create = "vm.builtin.paged_attention_kv_cache_create"
        cache = relax.call_pure_packed(create, *arguments, ty_args=relax.AnyType())
        bb.emit_func_output(cache)


def _functions(bb: relax.BlockBuilder, config: DecoderConfig, target: Target) -> list[Any]:
    """Return the function arguments of the runtime's constructor, in its order."""
    shape = kernels.AttentionShape(
        config.num_heads, config.num_kv_heads, config.head_dim, config.kv_dtype
    )
    unit = kernels.vector_unit(target)
    rope = config.rope
    frequencies = kernels.rope_frequencies(config.head_dim, rope.theta, rope.scale, rope.scaling)

    def add(function: tirx.PrimFunc) -> relax.GlobalVar:
        return bb.add_func(function, function.attrs["global_symbol"])

    def attention(function: tirx.PrimFunc) -> relax.Tuple:
        return relax.Tuple([tvm.ir.StringImm("tirx"), add(function)])

    absent = relax.Tuple([])
    return [
        add(kernels.build_append(shape, unit)),
        relax.prim_value(0),  # append of multi-head latent attention
        attention(kernels.build_ragged_prefill(shape, unit)),
        attention(kernels.build_paged_prefill(shape, unit)),
        attention(kernels.build_decode(shape, unit)),
        absent,  # prefill with a sliding window
        absent,  # decode with a sliding window
        absent,  # attention over token trees in the cache, for speculative decoding
        absent,  # attention over token trees of a prefill
        absent,  # multi-head latent attention
        relax.Tuple([add(kernels.build_merge(shape, unit))]),
        add(kernels.build_rope(shape, unit, frequencies)),
        add(kernels.build_copy_page(shape, unit)),
        add(kernels.build_read(shape, unit, config.num_layers)),
        add(kernels.build_compact(shape, unit)),
    ]
