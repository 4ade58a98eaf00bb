"""The functions of the paged KV cache on GPUs: TVM's, and our own where those do not serve.

Attention on CUDA is `kernels.cuda_attention`'s where that serves. For windows, capped scores and
heads that TVM's kernels do not cover, it is that of `kernels.attention_gpu_decode` and
`attention_gpu_prefill`. The rest is that of TVM's `TIRPagedKVCache`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx
from tvm.relax.frontend.nn.llm.kv_cache import RopeMode, TIRPagedKVCache

from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels import (
    attention_gpu_decode,
    attention_gpu_prefill,
    attention_tvm,
    cuda_attention,
    cuda_attention_prefill,
)
from fairy_compile.kernels.attention_shape import PAGE

if TYPE_CHECKING:
    from fairy_compile.models.config import DecoderConfig
    from fairy_compile.targets import Target

# Places among the functions, in the order of `kv_cache._functions`.
_APPEND_LATENT = 1
_RAGGED, _PAGED, _DECODE = 2, 3, 4
_ATTENTION = {_RAGGED, _PAGED, _DECODE}
_UNUSED_KERNELS = (5, 6, 7, 8)
_MERGE = 10


def gpu_functions(bb: relax.BlockBuilder, config: DecoderConfig, target: Target) -> list[Any]:
    """Return the function arguments of the runtime's constructor for a GPU.

    Left out are kernels for the runtime's own windows, token trees and latent attention, which
    nothing calls.

    Raises:
        UnsupportedError: no kernel takes heads of the model's size.
    """
    rope = config.rope
    scaling = {}
    if rope.kind == "llama3":
        scaling = {"rope_type": "llama3", **rope.settings}
    names = ("max_sequences", "max_total_tokens", "prefill_chunk", "sliding_window")
    sizes = {name: tirx.Var(name, "int64") for name in names}
    params = [relax.Var(f"{name}_", relax.ShapeType([var])) for name, var in sizes.items()]
    # TVM builds the call as a class; it is emitted into a function that is dropped later.
    with bb.function("upstream_kv_cache", params=params, private=True):
        try:
            cache = TIRPagedKVCache(
                "mha",
                sizes["max_sequences"],
                sizes["max_total_tokens"],
                sizes["prefill_chunk"],
                PAGE,
                sizes["sliding_window"],
                layer_partition=relax.ShapeExpr([0, config.num_layers]),
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                qk_head_dim=config.head_dim,
                v_head_dim=config.head_dim,
                mla_original_qk_head_dim=0,
                mla_original_v_head_dim=0,
                rope_mode=RopeMode.NORMAL,
                rope_scale=1.0 / rope.settings["factor"] if rope.kind == "linear" else 1.0,
                rope_theta=rope.theta,
                rope_scaling=scaling,
                rope_ext_factors=relax.prim_value(0),
                rotary_dim=rope.rotary_dim(config.head_dim),
                enable_disaggregation=False,
                dtype=config.kv_dtype,
                target=_attention_target(config, target),
            )
        except ValueError as error:  # no tile of a kernel has such heads
            bb.emit_func_output(relax.Tuple([]))
            raise _unsupported_heads(config, target) from error
        call = bb.lookup_binding(cache._expr)
        bb.emit_func_output(cache._expr)
    # Before the functions are the name of the packed function and 13 sizes.
    functions = list(call.args)[14:]
    functions[_APPEND_LATENT] = relax.prim_value(0)
    for index in _UNUSED_KERNELS:
        functions[index] = relax.Tuple([])
    limits = target.limits
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    shape = (kv_heads, heads, head_dim, config.kv_dtype)
    own = _own_attention(config, target)
    for index in sorted(_ATTENTION - own.keys()):
        var = functions[index].fields[1]
        kernel = bb.get()[var]
        if index != _DECODE:
            kernel = attention_tvm.fit_prefill(kernel, index == _RAGGED, shape, scaling, limits)
        elif not attention_tvm.covers_heads(kernel, heads, head_dim):
            kernel = None
        if kernel is None:
            own[index] = _build_attention(index, config, target)
        else:
            bb.update_func(var, kernel)
    for index, kernel in own.items():
        added = bb.add_func(kernel, str(kernel.attrs["global_symbol"]))
        functions[index] = relax.Tuple([tvm.ir.StringImm("tirx"), added])
    merge = attention_tvm.build_merge(heads, head_dim, config.kv_dtype, limits.max_threads)
    functions[_MERGE] = relax.Tuple([bb.add_func(merge, "kv_cache_merge")])
    return functions


def _own_attention(config: DecoderConfig, target: Target) -> dict[int, tirx.PrimFunc]:
    """Return place among the functions -> our own kernel, where it is known to be the one."""
    shape = config.attention_shape
    own = {}
    if target.device == "cuda":
        if cuda_attention.serves(shape):
            own[_DECODE] = cuda_attention.build_decode(shape)
        if cuda_attention_prefill.serves(shape):
            own[_RAGGED] = cuda_attention_prefill.build_ragged_prefill(shape)
            own[_PAGED] = cuda_attention_prefill.build_paged_prefill(shape)
    if not attention_tvm.serves(shape):
        for index in sorted(_ATTENTION - own.keys()):
            own[index] = _build_attention(index, config, target)
    return own


def _build_attention(index: int, config: DecoderConfig, target: Target) -> tirx.PrimFunc:
    """Return our own kernel for any GPU.

    Raises:
        UnsupportedError: heads are too large for it.
    """
    shape = config.attention_shape
    served = attention_gpu_decode.serves(shape) and attention_gpu_prefill.serves(shape)
    if not served:
        raise _unsupported_heads(config, target)
    build = {
        _DECODE: attention_gpu_decode.build_decode,
        _RAGGED: attention_gpu_prefill.build_ragged_prefill,
        _PAGED: attention_gpu_prefill.build_paged_prefill,
    }
    return build[index](shape)


def _unsupported_heads(config: DecoderConfig, target: Target) -> UnsupportedError:
    return UnsupportedError(
        f"attention heads have {config.head_dim} elements; kernels of target {target.name} take "
        f"multiples of 4 up to {attention_gpu_prefill.MOST_DIM}; build with --target cpu"
    )


def _attention_target(config: DecoderConfig, target: Target) -> Any:
    """Return the TVM target upstream's attention kernels are shaped for.

    They count two bytes an element whatever the dtype, and would take more shared memory than there
    is with float32 keys and values; half the threads take half the memory.
    """
    limits = target.limits
    if limits and config.kv_dtype == "float32":
        target = replace(target, limits=replace(limits, max_threads=min(256, limits.max_threads)))
    return target.to_tvm()
