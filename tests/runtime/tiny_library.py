"""A one-layer dense Llama with random weights, exported as an MLC model directory.

An implementation of the model library contract that shares no code with the compiler: runtime
tests drive it where the compiler should not be part of the test. `reference_logits` is the same
network in NumPy.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.contrib import tvmjs
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.script import tirx as T

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 32, 4, 2, 8, 64, 320
CONTEXT, CHUNK, MAX_BATCH, EPS, THETA = 64, 16, 4, 1e-5, 10000.0
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


class TinyLlama(nn.Module):
    """Embedding, one pre-norm layer with grouped-query attention and SwiGLU, norm, head."""

    def __init__(self) -> None:
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.norm_attention = nn.RMSNorm(HIDDEN, -1, EPS, bias=False)
        self.qkv = nn.Linear(HIDDEN, QKV, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.norm_mlp = nn.RMSNorm(HIDDEN, -1, EPS, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN, -1, EPS, bias=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def _hidden(self, x, cache):
        batch, length, _ = x.shape
        qkv = op.reshape(self.qkv(self.norm_attention(x)), (batch, length, QKV // HEAD_DIM, 8))
        mixed = cache.attention_with_fused_qkv(0, qkv, HEADS, sm_scale=HEAD_DIM**-0.5)
        x = x + self.out(op.reshape(mixed, (batch, length, HEADS * HEAD_DIM)))
        gate, up = op.split(self.gate_up(self.norm_mlp(x)), 2, axis=-1)
        return self.norm(x + self.down(op.silu(gate) * up))

    def embed(self, ids):
        return self.embedding(ids)

    def prefill(self, x, cache):
        def last_row(a):
            return te.compute((1, 1, HIDDEN), lambda i, _, k: a[i, a.shape[1] - 1, k])

        hidden = self._hidden(x, cache)
        return self.head(op.tensor_expr_op(last_row, "last_row", [hidden])), cache

    def batch_prefill(self, x, positions, cache):
        return self.head(op.take(self._hidden(x, cache), positions, axis=1)), cache

    def decode(self, x, cache):
        return self.head(self._hidden(x, cache)), cache

    def batch_decode(self, x, cache):
        return self.head(self._hidden(x, cache)), cache

    def softmax_with_temperature(self, logits, temperature):
        def scaled(x, t):
            return te.compute(
                x.shape, lambda i, _, k: x[i, 0, k] / te.max(t[i], tirx.const(1e-6, "float32"))
            )

        return op.softmax(op.tensor_expr_op(scaled, "scaled", [logits, temperature]), axis=-1)


@T.prim_func(s_tir=True)
def _bias(logits_: T.handle, rows_: T.handle, ids_: T.handle, bias_: T.handle):
    T.func_attr({"global_symbol": "apply_logit_bias_inplace", "tirx.is_scheduled": True})
    b, v, k = T.int32(), T.int32(), T.int32()
    logits = T.match_buffer(logits_, (b, v), "float32")
    rows = T.match_buffer(rows_, (k,), "int32")
    ids = T.match_buffer(ids_, (k,), "int32")
    bias = T.match_buffer(bias_, (k,), "float32")
    for i in range(k):
        logits[rows[i], ids[i]] += bias[i]


@T.prim_func(s_tir=True)
def _penalty(
    logits_: T.handle,
    seqs_: T.handle,
    rows_: T.handle,
    ids_: T.handle,
    counts_: T.handle,
    penalties_: T.handle,
):
    T.func_attr({"global_symbol": "apply_penalty_inplace", "tirx.is_scheduled": True})
    b, v, s, k = T.int32(), T.int32(), T.int32(), T.int32()
    logits = T.match_buffer(logits_, (b, v), "float32")
    seqs = T.match_buffer(seqs_, (s,), "int32")
    rows = T.match_buffer(rows_, (k,), "int32")
    ids = T.match_buffer(ids_, (k,), "int32")
    counts = T.match_buffer(counts_, (k,), "int32")
    penalties = T.match_buffer(penalties_, (s, 3), "float32")
    for i in range(k):
        logits[seqs[rows[i]], ids[i]] -= (
            penalties[rows[i], 0] + T.cast(counts[i], "float32") * penalties[rows[i], 1]
        )
        logits[seqs[rows[i]], ids[i]] = T.if_then_else(
            logits[seqs[rows[i]], ids[i]] < T.float32(0),
            logits[seqs[rows[i]], ids[i]] * penalties[rows[i], 2],
            logits[seqs[rows[i]], ids[i]] / penalties[rows[i], 2],
        )


@T.prim_func(s_tir=True)
def _bitmask(logits_: T.handle, seqs_: T.handle, mask_: T.handle):
    T.func_attr({"global_symbol": "apply_bitmask_inplace", "tirx.is_scheduled": True})
    b, v, s = T.int32(), T.int32(), T.int32()
    logits = T.match_buffer(logits_, (b, v), "float32")
    seqs = T.match_buffer(seqs_, (s,), "int32")
    mask = T.match_buffer(mask_, (b, (v + 31) // 32), "int32")
    for i in range(s):
        for j in range(v):
            if (mask[seqs[i], j // 32] >> (j % 32)) & 1 == 0:
                logits[seqs[i], j] = T.min_value("float32")


def _export(target: tvm.target.Target) -> tuple[tvm.IRModule, list]:
    packed = {"param_mode": "packed", "effect_mode": "none"}
    bare = {"param_mode": "none", "effect_mode": "none"}
    tensor, cache = nn.spec.Tensor, nn.spec.Object(object_type=PagedKVCache)
    mod, params = TinyLlama().export_tvm(
        spec={
            "embed": {"ids": tensor(["n"], "int32"), "$": packed},
            "prefill": {"x": tensor([1, "n", HIDDEN], "float32"), "cache": cache, "$": packed},
            "batch_prefill": {
                "x": tensor([1, "n", HIDDEN], "float32"),
                "positions": tensor(["b"], "int32"),
                "cache": cache,
                "$": packed,
            },
            "decode": {"x": tensor([1, 1, HIDDEN], "float32"), "cache": cache, "$": packed},
            "batch_decode": {"x": tensor(["b", 1, HIDDEN], "float32"), "cache": cache, "$": packed},
            "softmax_with_temperature": {
                "logits": tensor(["b", 1, VOCAB], "float32"),
                "temperature": tensor(["b"], "float32"),
                "$": bare,
            },
        }
    )
    builder = relax.BlockBuilder(mod)
    sizes = [tirx.Var(n, "int64") for n in ("max_batch", "max_total", "chunk", "page", "sliding")]
    arguments = [relax.Var(f"{s.name}_", relax.ShapeType([s])) for s in sizes]
    with builder.function("create_tir_paged_kv_cache", params=arguments):
        kv_cache = TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=sizes[0],
            max_total_seq_len=sizes[1],
            prefill_chunk_size=sizes[2],
            page_size=sizes[3],
            support_sliding_window=sizes[4],
            layer_partition=relax.ShapeExpr([0, 1]),
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            qk_head_dim=HEAD_DIM,
            v_head_dim=HEAD_DIM,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=int(THETA),
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=HEAD_DIM,
            enable_disaggregation=False,
            dtype="float32",
            target=target,
        )
        builder.emit_func_output(kv_cache._expr)
    with builder.function("alloc_embedding_tensor", []):
        shape = relax.ShapeExpr([CHUNK, HIDDEN])
        builder.emit_func_output(builder.emit(relax.op.builtin.alloc_tensor(shape, "float32", 0)))
    with builder.function("_metadata", []):
        builder.emit_func_output(tvm.ir.StringImm(json.dumps(_metadata(params))))
    mod = builder.finalize()
    for function in (_bias, _penalty, _bitmask):
        mod[function.attrs["global_symbol"]] = function
    return mod, params


def _metadata(params: list) -> dict:
    return {
        "model_type": "tiny_llama",
        "quantization": "none",
        "context_window_size": CONTEXT,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": CHUNK,
        "max_batch_size": MAX_BATCH,
        "tensor_parallel_shards": 1,
        "memory_usage": {},
        "kv_cache": {
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
        },
        "params": [
            {"name": n, "shape": [int(d) for d in p.shape], "dtype": str(p.dtype), "preprocs": []}
            for n, p in params
        ],
    }


def write_tiny_model(directory: Path, tokenizer_json: str, *, seed: int = 0) -> dict:
    """Write library, weights, config and tokenizer into ``directory``; return the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    target = tvm.target.Target({"kind": "llvm"})
    mod, params = _export(target)
    with target:
        tvm.relax.build(mod, target=target).export_library(str(directory / "model.so"))
    rng = np.random.default_rng(seed)
    weights = {}
    for name, param in params:
        shape = [int(d) for d in param.shape]
        values = rng.normal(size=shape) * (1.5 if len(shape) > 1 else 0.1) / shape[-1] ** 0.5
        weights[name] = (values + (len(shape) == 1)).astype("float32")
    weights["embedding.weight"] *= 4
    weights["head.weight"] *= 3
    tvmjs.dump_tensor_cache(weights, str(directory), encode_format="raw", show_progress=False)
    config = {
        "model_type": "tiny_llama",
        "quantization": "none",
        "model_config": {"vocab_size": VOCAB, "prefill_chunk_size": CHUNK},
        "vocab_size": VOCAB,
        "context_window_size": CONTEXT,
        "prefill_chunk_size": CHUNK,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "temperature": 0.8,
        "top_p": 0.95,
        "tokenizer_files": ["tokenizer.json"],
        "conv_template": {"roles": {}, "seps": [""], "stop_str": [], "stop_token_ids": [0]},
        "eos_token_id": 0,
    }
    (directory / "mlc-chat-config.json").write_text(json.dumps(config), "utf-8")
    (directory / "tokenizer.json").write_text(tokenizer_json, "utf-8")
    return weights


def reference_logits(weights: dict, tokens: list[int]) -> np.ndarray:
    """Return float64 logits [len, vocab] of the same network."""
    w = {name: value.astype("float64") for name, value in weights.items()}

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w[f"{name}.weight"]

    def rope(x):
        half = HEAD_DIM // 2
        angles = np.arange(len(tokens))[:, None] * THETA ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["embedding.weight"][tokens]
    qkv = (norm(x, "norm_attention") @ w["qkv.weight"].T).reshape(len(tokens), -1, HEAD_DIM)
    q, k, v = np.split(qkv, [HEADS, HEADS + KV_HEADS], axis=1)
    k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (rope(k), v))
    scores = np.einsum("qhd,khd->hqk", rope(q), k) / HEAD_DIM**0.5
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(len(tokens), -1) @ w["out.weight"].T
    gate, up = np.split(norm(x, "norm_mlp") @ w["gate_up.weight"].T, 2, axis=-1)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down.weight"].T
    return norm(x, "norm") @ w["head.weight"].T
