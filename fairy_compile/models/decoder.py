"""The Llama-style decoder all dense families share, as Relax modules.

Linear layers come from a planner, so that this file says what a model computes and nothing about
how weights are stored. Activations have the dtype ``config.act_dtype``, logits are float32.

A family that differs says so in subclasses: a module takes the parts it is made of from its class
attributes ``*_type``, and linear layers from ``plan_*`` methods.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from fairy_compile.models.config import DecoderConfig
from fairy_compile.models.elementwise import RMSNorm, gate_product, soft_cap, split
from fairy_compile.models.engine_functions import softmax_with_temperature
from fairy_compile.models.kv_cache import attend
from fairy_compile.models.linear import (
    LinearCall,
    LinearPlanner,
    each_row_alone,
    make_linear,
)
from fairy_compile.models.page_tables import PageTables


def gather_rows(table: Tensor, rows: Tensor, name: str, dtype: str, scale: float = 1.0) -> Tensor:
    """Return scale * table[rows] as ``dtype``: (v, h) and int32 (n,) -> (n, h).

    Indices are clamped into the table, so that a wrong one can never read outside it.
    """

    def define(values: te.Tensor, index: te.Tensor) -> te.Tensor:
        last = tirx.Cast("int32", values.shape[0]) - 1

        def value(i: Any, j: Any) -> Any:
            element = values[te.max(te.min(index[i], last), 0), j]
            if scale != 1.0:
                element = tirx.Cast("float32", element) * tirx.const(scale, "float32")
            return tirx.Cast(dtype, element)

        return te.compute((index.shape[0], values.shape[1]), value, name=name)

    return op.tensor_expr_op(define, name, [table, rows])


class Embedding(nn.Module):
    """Token embedding (vocab, hidden) in its storage dtype; rows come out as ``act_dtype``."""

    def __init__(
        self, vocab: int, hidden: int, dtype: str, act_dtype: str, scale: float = 1.0
    ) -> None:
        self.weight = nn.Parameter((vocab, hidden), dtype)
        self.act_dtype, self.scale = act_dtype, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids int32 (n,) -> (n, hidden), times ``scale``."""
        return gather_rows(self.weight, ids, "embed_tokens", self.act_dtype, self.scale)


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache, with one fused QKV call."""

    norm_type: type[nn.Module] = RMSNorm

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        self.config, self.target = config, target
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.q_size = self.heads * config.head_dim
        self.kv_size = self.kv_heads * config.head_dim
        self.qkv_proj = make_linear(self.plan_qkv(prefix, planner), target)
        self.o_proj = make_linear(
            planner.linear(
                f"{prefix}.o_proj",
                [f"{prefix}.o_proj"],
                self.q_size,
                [config.hidden_size],
                config.o_bias,
            ),
            target,
        )
        if config.qk_norm:
            self.q_norm = self.norm_type(config.head_dim, config.rms_norm_eps, target)
            self.k_norm = self.norm_type(config.head_dim, config.rms_norm_eps, target)

    def plan_qkv(self, prefix: str, planner: LinearPlanner) -> list[LinearCall]:
        """Plan the layers that give queries, keys and values, in this order."""
        config = self.config
        return planner.linear(
            f"{prefix}.qkv_proj",
            [f"{prefix}.{part}_proj" for part in "qkv"],
            config.hidden_size,
            [self.q_size, self.kv_size, self.kv_size],
            config.qkv_bias,
        )

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Attend from x (batch, tokens, hidden); rotary embedding happens in the cache."""
        batch, tokens, _ = x.shape
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.config.head_dim
        qkv = op.reshape(self.qkv_proj(x), (batch, tokens, heads + 2 * kv_heads, head_dim))
        if self.config.qk_norm:
            q, k, v = split(qkv, [heads, kv_heads, kv_heads], axis=2)
            qkv = op.concat([self.q_norm(q), self.k_norm(k), v], dim=2)
        y = attend(cache, layer, qkv, self.config, self.target)
        return self.o_proj(op.reshape(y, (batch, tokens, heads * head_dim)))


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with one fused gate/up call."""

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        inner, hidden = config.intermediate_size, config.hidden_size
        self.config, self.target = config, target
        self.gate_up_proj = make_linear(self.plan_gate_up(prefix, planner), target)
        self.down_proj = make_linear(
            planner.linear(
                f"{prefix}.down_proj", [f"{prefix}.down_proj"], inner, [hidden], config.mlp_bias
            ),
            target,
        )

    def plan_gate_up(self, prefix: str, planner: LinearPlanner) -> list[LinearCall]:
        """Plan the layers that give gate and up, in this order."""
        config = self.config
        return planner.linear(
            f"{prefix}.gate_up_proj",
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            config.hidden_size,
            [config.intermediate_size] * 2,
            config.mlp_bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated feed-forward layer."""
        gated = gate_product(self.gate_up_proj(x), self.config.activation, self.target)
        return self.down_proj(gated)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    attention_type: type[nn.Module] = Attention
    mlp_type: type[nn.Module] = MLP
    norm_type: type[nn.Module] = RMSNorm

    def __init__(
        self, prefix: str, config: DecoderConfig, planner: LinearPlanner, target: Any
    ) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = self.norm_type(size, eps, target)
        self.self_attn = self.attention_type(f"{prefix}.self_attn", config, planner, target)
        self.post_attention_layernorm = self.norm_type(size, eps, target)
        self.mlp = self.mlp_type(f"{prefix}.mlp", config, planner, target)

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """Run one layer over x (batch, tokens, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm; parameter names follow the Hugging Face checkpoint."""

    layer_type: type[nn.Module] = DecoderLayer
    norm_type: type[nn.Module] = RMSNorm

    def __init__(self, config: DecoderConfig, planner: LinearPlanner, target: Any) -> None:
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            planner.dtype("model.embed_tokens.weight"),
            config.act_dtype,
            self.embed_scale(config, planner),
        )
        self.layers = nn.ModuleList(
            [
                self.layer_type(f"model.layers.{i}", config, planner, target)
                for i in range(config.num_layers)
            ]
        )
        self.norm = self.norm_type(config.hidden_size, config.rms_norm_eps, target)

    def embed_scale(self, config: DecoderConfig, planner: LinearPlanner) -> float:
        """Return the factor on embedded tokens."""
        return 1.0

    def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
        """Run all layers over embedded tokens x (batch, tokens, hidden)."""
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder with its output head, and the entry points an engine calls."""

    decoder_type: type[nn.Module] = Decoder

    def __init__(self, config: DecoderConfig, planner: LinearPlanner, target: Any) -> None:
        self.config = config
        self.target = target
        self.model = self.decoder_type(config, planner, target)
        self.lm_head = make_linear(
            planner.head("lm_head", config.hidden_size, config.vocab_size),
            target,
            shared=self.model.embed_tokens.weight,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return float32 logits (..., vocab) of x (..., hidden)."""
        logits = self.lm_head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else soft_cap(logits, cap)

    def embed(self, ids: Tensor) -> Tensor:
        """Embed ids int32 (n,) -> (n, hidden)."""
        return self.model.embed_tokens(ids)

    def prefill(self, x: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Prefill one sequence x (1, n, hidden) -> logits (1, 1, vocab) of its last token."""

        def last(a: te.Tensor) -> te.Tensor:
            return te.compute(
                (1, 1, a.shape[2]), lambda i, _, k: a[i, a.shape[1] - 1, k], name="last_token"
            )

        hidden = self.model(x, cache)
        return self.logits(op.tensor_expr_op(last, "last_token", [hidden])), cache

    def batch_prefill(
        self, x: Tensor, logit_positions: Tensor, cache: PagedKVCache
    ) -> tuple[Tensor, PagedKVCache]:
        """Prefill concatenated sequences x (1, n, hidden) -> logits (1, b, vocab).

        logit_positions int32 (b,) says which rows of x get logits.
        """
        return self._picked_logits(self.model(x, cache), logit_positions), cache

    def _picked_logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return logits (1, b, vocab) of rows ``positions`` of hidden (1, n, hidden)."""
        rows = op.reshape(hidden, (hidden.shape[1], self.config.hidden_size))
        picked = gather_rows(rows, positions, "pick_logit_rows", hidden.dtype)
        return self.logits(op.reshape(picked, (1, picked.shape[0], picked.shape[1])))

    def decode(self, x: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Decode one token of one sequence, x (1, 1, hidden) -> logits (1, 1, vocab)."""
        return self.logits(self.model(x, cache)), cache

    def batch_decode(self, x: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Decode one token of each sequence, x (b, 1, hidden) -> logits (b, 1, vocab)."""
        return self.logits(self.model(x, cache)), cache

    def batch_decode_exact(self, x: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Do as `batch_decode`, with the logits `decode` gives each sequence, bit for bit."""
        with each_row_alone():
            return self.batch_decode(x, cache)

    def batch_verify(self, x: Tensor, cache: PagedKVCache) -> tuple[Tensor, PagedKVCache]:
        """Run proposed tokens of several sequences, x (1, n, hidden) -> logits (1, n, vocab)."""
        return self.logits(self.model(x, cache)), cache

    def batch_prefill_pages(
        self,
        ids: Tensor,
        positions: Tensor,
        places: Tensor,
        indptr: Tensor,
        values: Tensor,
        last_page: Tensor,
        offsets: Tensor,
        logit_positions: Tensor,
        rows: Tensor,
        pages: list[Tensor],
    ) -> tuple[Tensor]:
        """Do as `batch_prefill` from tokens int32 (n,); the rest is that of `PageTables`."""
        cache = PageTables(positions, places, indptr, values, last_page, offsets, rows, pages)
        x = op.reshape(self.embed(ids), (1, ids.shape[0], self.config.hidden_size))
        return (self._picked_logits(self.model(x, cache), logit_positions),)

    def decode_pages(
        self,
        ids: Tensor,
        positions: Tensor,
        places: Tensor,
        indptr: Tensor,
        values: Tensor,
        last_page: Tensor,
        offsets: Tensor,
        pages: list[Tensor],
    ) -> tuple[Tensor]:
        """Do as `batch_decode` from tokens int32 (b,); the rest is that of `PageTables`."""
        cache = PageTables(positions, places, indptr, values, last_page, offsets, None, pages)
        x = op.reshape(self.embed(ids), (ids.shape[0], 1, self.config.hidden_size))
        return (self.logits(self.model(x, cache)),)

    batch_decode_pages = decode_pages  # of any number of sequences

    def softmax_with_temperature(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """See `engine_functions.softmax_with_temperature`."""
        return softmax_with_temperature(logits, temperature, self.target)
