"""The paged KV cache of a model: how it is created, and attention over it.

The cache is the runtime's (`vm.builtin.paged_attention_kv_cache_create`), which manages sequences
and pages; the functions it calls to work on them are `kernels.attention_cpu`'s on CPUs, and those
of `kv_cache_gpu` on GPUs.
The cache demands one dtype for pages and for everything that goes in and comes out, so a float16
cache means that queries and outputs are rounded to float16 as well. Arithmetic in between is
float32.

Rotary embedding happens in the cache, which knows one rule. Where layers differ, and on GPUs where
the rule is none of TVM's, it happens before, at the positions the cache tells.

Sliding windows are a matter of the kernels: the cache keeps the keys of all positions. So sequences
can be forked, cut back and shared as ever, and only reading is saved. The runtime's own windows
(`AttnKind.MHA_SLIDING`) keep all keys too, see the whole of a prefill chunk whatever its length,
and have no place for models of which every layer has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import (
    AttnKind,
    PagedKVCache,
    RopeMode,
)

from fairy_compile.kernels import attention_cpu as kernels
from fairy_compile.kernels.attention_shape import FLOAT16_MAX
from fairy_compile.models.kv_cache_gpu import gpu_functions
from fairy_compile.models.page_tables import PageTables
from fairy_compile.models.shapes import product

if TYPE_CHECKING:
    from fairy_compile.models.config import DecoderConfig
    from fairy_compile.targets import Target

CREATE = "create_tir_paged_kv_cache"


def attend(
    cache: PagedKVCache | PageTables,
    layer: int,
    qkv: Tensor,
    config: DecoderConfig,
    target: Target,
) -> Tensor:
    """Append new keys and values to the cache and attend over it, with rotary embedding.

    Args:
        cache: the runtime's cache, or one whose pages are arguments; in ``config.kv_dtype``.
        layer: which layer's pages.
        qkv: ``config.act_dtype`` (b, s, heads + 2 kv_heads, head_dim).
        config: sizes of the model.
        target: what is compiled for.

    Returns:
        ``config.act_dtype`` (b, s, heads, head_dim).
    """
    scale = config.attention_scale or config.head_dim**-0.5
    if config.window is not None and config.is_local(layer):
        scale = -scale  # asks the kernels for the window, see `kernels.AttentionShape`
    if isinstance(cache, PageTables):
        return cache.attend(layer, qkv, scale, config)
    if not _rotates_in_cache(config, target):
        qkv = _rotate(cache, layer, qkv, config, target)
    if config.kv_dtype != qkv.dtype:
        if config.kv_dtype == "float16":
            qkv = op.tensor_expr_op(_to_float16, "to_float16", [qkv])
        else:
            qkv = qkv.astype(config.kv_dtype)
    y = cache.attention_with_fused_qkv(layer, qkv, config.num_heads, sm_scale=scale)
    return y if y.dtype == config.act_dtype else y.astype(config.act_dtype)


def _to_float16(x: te.Tensor) -> te.Tensor:
    """Round to float16, saturating: an infinity would make NaNs of a whole row."""

    def convert(*at: Any) -> Any:
        # In float32, since bfloat16 would round the limit itself up to 65536.
        value, limit = tirx.Cast("float32", x[at]), tirx.const(FLOAT16_MAX, "float32")
        return tirx.Cast("float16", te.max(te.min(value, limit), -limit))

    return te.compute(x.shape, convert, name="to_float16")


# Rules that TVM's rope for GPUs computes as we do; on CPUs it is our own.
_GPU_RULES = ("default", "linear", "llama3")


def _rotates_in_cache(config: DecoderConfig, target: Target) -> bool:
    if config.local_rope is not None:
        return False
    return not target.is_gpu or config.rope.kind in _GPU_RULES


def _rotate(
    cache: PagedKVCache, layer: int, qkv: Tensor, config: DecoderConfig, target: Target
) -> Tensor:
    """Rotate the queries and keys of qkv (b, s, heads + 2 kv_heads, head_dim)."""
    *lead, heads, head_dim = qkv.shape
    rows = product(lead)
    flat = op.reshape(qkv, (rows, heads, head_dim))
    positions = cache.get_query_positions(rows)
    table = config.rope_table(layer)
    local = config.local_rope is not None and config.is_local(layer)
    name = "rotate_local" if local else "rotate"
    if target.is_gpu:
        frequencies = Tensor.from_const(table.array())
        turned = config.num_heads + config.num_kv_heads

        def define(x: te.Tensor, at: te.Tensor, frequency: te.Tensor) -> te.Tensor:
            return _rotated(x, at, frequency, table.amplitude, turned)

        y = op.tensor_expr_op(define, name, [flat, positions, frequencies])
    else:
        shape = kernels.AttentionShape(config.num_heads, config.num_kv_heads, head_dim, qkv.dtype)
        y = op.tensor_ir_op(
            kernels.build_rotate(shape, kernels.vector_unit(target), table).with_attr(
                "op_pattern", 8
            ),
            name,
            [flat, positions],
            Tensor.placeholder((rows, heads, head_dim), qkv.dtype),
        )
    return op.reshape(y, qkv.shape)


def _rotated(
    x: te.Tensor, positions: te.Tensor, frequency: te.Tensor, amplitude: float, turned: int
) -> te.Tensor:
    """Return x with the elements of its first ``turned`` heads rotated."""
    half = int(frequency.shape[0])

    def value(n: Any, head: Any, i: Any) -> Any:
        angle = tirx.Cast("float32", positions[n]) * frequency[i % half]
        own = tirx.Cast("float32", x[n, head, i])
        partner = tirx.if_then_else(
            i < half,
            -tirx.Cast("float32", x[n, head, i + half]),
            tirx.Cast("float32", x[n, head, i - half]),
        )
        rotated = (te.cos(angle) * own + te.sin(angle) * partner) * tirx.const(amplitude, "float32")
        turns = tirx.all(head < turned, i < 2 * half)
        return tirx.if_then_else(turns, tirx.Cast(x.dtype, rotated), x[n, head, i])

    return te.compute(x.shape, value, name="rotate")


def add_kv_cache(bb: relax.BlockBuilder, config: DecoderConfig, target: Target) -> None:
    """Add ``create_tir_paged_kv_cache`` to the module under construction.

    It takes five shapes of one element: sequences, total tokens, prefill chunk, page size (16), and
    whether sliding windows are used (0: the kernels refuse them).
    """
    names = ("max_sequences", "max_total_tokens", "prefill_chunk", "page_size", "sliding_window")
    sizes = [tirx.Var(name, "int64") for name in names]
    params = [relax.Var(f"{v.name}_", relax.ShapeType([v])) for v in sizes]
    mode = RopeMode.NORMAL if _rotates_in_cache(config, target) else RopeMode.NONE
    functions = (gpu_functions if target.is_gpu else _functions)(bb, config, target)
    sequences, tokens, chunk, *others = sizes
    # The runtime makes buffers of a chunk's rows, which a step of all sequences needs as well.
    created = [sequences, tokens, tirx.max(chunk, sequences), *others]
    with bb.function(CREATE, params=params):
        prim = relax.prim_value
        arguments = [
            # TVM 0.27 takes a sixth size, for layers with sliding windows; 0.26 refuses it.
            relax.ShapeExpr(created),
            relax.ShapeExpr([0, config.num_layers]),
            prim(config.num_heads),
            prim(config.num_kv_heads),
            prim(config.head_dim),
            prim(config.head_dim),
            relax.ShapeExpr([int(AttnKind.MHA)] * config.num_layers),
            prim(False),  # no disaggregation
            prim(int(mode)),
            prim(1.0),  # rope scale and theta, which only kernels that rotate themselves look at
            prim(config.rope.theta),
            prim(0),  # no rope extension factors
            relax.op.zeros((), config.kv_dtype),
            *functions,
        ]
        create = "vm.builtin.paged_attention_kv_cache_create"
        cache = relax.call_pure_packed(create, *arguments, ty_args=relax.AnyType())
        bb.emit_func_output(cache)


def _functions(bb: relax.BlockBuilder, config: DecoderConfig, target: Target) -> list[Any]:
    """Return the function arguments of the runtime's constructor, in its order."""
    shape = config.attention_shape
    unit = kernels.vector_unit(target)

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
        add(kernels.build_rope(shape, unit, config.rope_table())),
        add(kernels.build_copy_page(shape, unit)),
        add(kernels.build_read(shape, unit, config.num_layers)),
        add(kernels.build_compact(shape, unit)),
    ]
