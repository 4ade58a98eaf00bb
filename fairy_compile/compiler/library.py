"""From a planned model to a model library: the Relax module, its entry points and metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.artifact.contract import (
    CHAT_FUNCTIONS,
    DRAFT_DEVICES,
    EXACT_DECODE,
    GPU_SAMPLER_FUNCTIONS,
    REQUIRED_FUNCTIONS,
)
from fairy_compile.compiler.plan import Planner
from fairy_compile.kernels.speculative_gpu import speculative_functions
from fairy_compile.models import DecoderConfig, network_of
from fairy_compile.models import engine_functions as engine
from fairy_compile.models.decoder import CausalLM
from fairy_compile.models.elementwise import RMSNorm
from fairy_compile.models.gpu_sampler import add_gpu_sampler
from fairy_compile.models.kv_cache import add_kv_cache
from fairy_compile.models.linear import LinearCall, PlannedLinear
from fairy_compile.models.page_tables import add_alloc_pages, page_specs
from fairy_compile.targets import Target


def entry_points(target: Target) -> list[str]:
    """Return what an engine calls in a library for ``target``; everything else is internal."""
    required = REQUIRED_FUNCTIONS[target.device]
    return list(CHAT_FUNCTIONS | required if target.is_gpu else required)


@dataclass(frozen=True)
class Sizes:
    """Limits compiled into a library.

    Attributes:
        context: longest sequence in tokens.
        prefill_chunk: most tokens of one prefill call.
        max_batch: most sequences at a time.
        pages: whether it also has the functions of `models.page_tables`.
    """

    context: int
    prefill_chunk: int
    max_batch: int
    pages: bool = False


@dataclass(frozen=True)
class Param:
    """One parameter of the library, in the order its functions take them.

    Attributes:
        name: name in the library and in the shards.
        shape, dtype: of the stored array.
        call: the linear call it belongs to, or None.
        array: which of the call's arrays it is (``codes``, ``scales``, ..., ``bias``); for
            parameters outside linear calls, the same as ``name``.
        offset: what is added to the checkpoint's values, see `OffsetRMSNorm`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    call: LinearCall | None
    array: str
    offset: float = 0.0


def define(
    config: DecoderConfig, planner: Planner, target: Target, sizes: Sizes, quantization: str
) -> tuple[tvm.IRModule, list[Param], dict[str, Any]]:
    """Build the Relax module of a model.

    Args:
        config: sizes of the model.
        planner: picks kernels; its ``calls`` are filled in model order.
        target: what to compile for.
        sizes: limits compiled in.
        quantization: name shown in the metadata, e.g. ``w2``.

    Returns:
        (module, parameters in order, metadata dictionary).
    """
    network = network_of(config)(config, planner, target)
    spec = _entry_points(config, _needs_exact(planner, sizes))
    if target.device not in DRAFT_DEVICES:
        del spec["batch_verify"]
    if sizes.pages:
        spec.update(page_specs(config))
    module, named = network.export_tvm(spec=spec)
    params = _describe(network, named)
    metadata = _metadata(config, sizes, params, quantization)
    bb = relax.BlockBuilder(module)
    add_kv_cache(bb, config, target)
    if sizes.pages:
        add_alloc_pages(bb, config)
    engine.add_embedding_buffer(bb, sizes.prefill_chunk, config.hidden_size, config.act_dtype)
    engine.add_metadata(bb, metadata)
    if GPU_SAMPLER_FUNCTIONS.keys() & REQUIRED_FUNCTIONS[target.device].keys():
        add_gpu_sampler(bb, config.vocab_size)
    module = bb.finalize()
    functions = engine.inplace_functions(target)
    if target.device in DRAFT_DEVICES:
        functions |= speculative_functions()
    for name, func in functions.items():
        module[name] = func
    return module, params, metadata


def _needs_exact(planner: Planner, sizes: Sizes) -> bool:
    """Whether ``batch_decode`` may get rows enough to give other results than ``decode``."""
    starts = [call.kernel.decode_from for call in planner.calls if call.kernel]
    return any(start is not None and start <= sizes.max_batch for start in starts)


def _entry_points(config: DecoderConfig, exact: bool) -> dict[str, Any]:
    spec, hidden = nn.spec, config.hidden_size
    packed = {"param_mode": "packed", "effect_mode": "none"}
    cache = spec.Object(object_type=PagedKVCache)

    def tokens(*shape: Any) -> Any:
        return spec.Tensor([*shape, hidden], config.act_dtype)

    def ints(*shape: Any) -> Any:
        return spec.Tensor(list(shape), "int32")

    batch_decode = {"x": tokens("batch_size", 1), "cache": cache, "$": packed}
    return {
        "embed": {"ids": ints("seq_len"), "$": packed},
        "prefill": {"x": tokens(1, "seq_len"), "cache": cache, "$": packed},
        "batch_prefill": {
            "x": tokens(1, "seq_len"),
            "logit_positions": ints("batch_size"),
            "cache": cache,
            "$": packed,
        },
        "decode": {"x": tokens(1, 1), "cache": cache, "$": packed},
        "batch_decode": batch_decode,
        # Engines verify no more tokens in one call than there may be sequences.
        "batch_verify": {"x": tokens(1, "batch_size"), "cache": cache, "$": packed},
        **({EXACT_DECODE: dict(batch_decode)} if exact else {}),
        "softmax_with_temperature": {
            "logits": spec.Tensor(["batch_size", 1, "vocab_size"], "float32"),
            "temperature": spec.Tensor(["batch_size"], "float32"),
            "$": {"param_mode": "none", "effect_mode": "none"},
        },
    }


def _describe(network: CausalLM, named: list[tuple[str, nn.Parameter]]) -> list[Param]:
    owners: dict[str, tuple[LinearCall, str]] = {}
    offsets: dict[str, float] = {}
    for path, module in _modules(network):
        if isinstance(module, PlannedLinear):
            arrays = [*module.array_names, *(["bias"] if module.bias is not None else [])]
            owners.update({f"{path}.{array}": (module.call, array) for array in arrays})
        if isinstance(module, RMSNorm):
            offsets[f"{path}.weight"] = module.offset
    params = []
    for name, parameter in named:
        call, array = owners.get(name, (None, name))
        shape = tuple(int(d) for d in parameter.shape)
        offset = offsets.get(name, 0.0)
        params.append(Param(name, shape, str(parameter.dtype), call, array, offset))
    return params


def _modules(module: nn.Module, path: str = "") -> list[tuple[str, nn.Module]]:
    """Return every module below ``module`` with the path its parameters are named by."""
    found = [(path, module)]
    for name, value in module.__dict__.items():
        children = (
            [(f"{name}.{i}", child) for i, child in enumerate(value)]
            if isinstance(value, nn.ModuleList)
            else [(name, value)]
        )
        for child_name, child in children:
            if isinstance(child, nn.Module):
                found += _modules(child, f"{path}.{child_name}" if path else child_name)
    return found


def _metadata(
    config: DecoderConfig, sizes: Sizes, params: list[Param], quantization: str
) -> dict[str, Any]:
    return {
        "model_type": config.model_type,
        "quantization": quantization,
        "context_window_size": sizes.context,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": sizes.prefill_chunk,
        "max_batch_size": sizes.max_batch,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "disaggregation": False,
        "kv_state_kind": "kv_cache",
        "model_task": "chat",
        "memory_usage": {},
        "kv_cache": {
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
        },
        "params": [
            {"name": p.name, "shape": list(p.shape), "dtype": p.dtype, "preprocs": []}
            for p in params
        ],
    }
