"""iFairy in PyTorch: a causal language model whose linear layers are natively complex.

The model of arXiv 2508.05571 (`model_type: complexnet`), written from its formulas, with the names
of its published checkpoints, so that directories load either way:

    token_embeddings_{real,imag}.weight                       (V, H)
    layer.N.pre_layernorm.weight_{real,imag}                  (H,)
    layer.N.self_attn.{q,k,v,o}_proj.weight_{real,imag}       (n, m)
    layer.N.self_attn.attn_layernorm.weight_{real,imag}       (H,)
    layer.N.post_layernorm.weight_{real,imag}                 (H,)
    layer.N.mlp.{gate,up,down}_proj.weight_{real,imag}        (n, m)
    layer.N.mlp.ffn_layernorm.weight_{real,imag}              (I,)
    final_norm.weight_{real,imag}                             (H,)
    lm_head.weight                                            (V, 2H)

Activations hold [re, im] side by side in their last dimension. `fc.qat.prepare` with terms
``("W",)`` makes the linear layers compute with phase codes and round their inputs to int8; before
that the model is the full-precision one. Importing this module registers it with transformers'
Auto classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from fairy_compile.qat.layers import ComplexLinear

MODEL_TYPE = "complexnet"
Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of a sequence's rotations, each (tokens, head_dim)."""

# transformers renamed the field in version 5.24.
_CACHE_FIELD = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
)


class ComplexNetConfig(transformers.PretrainedConfig):
    """Sizes of an iFairy model, as its config.json gives them; complex numbers count once.

    ``attention_multiplier`` is a key of ours: the factor on attention scores, by default
    head_dim^-1/2 as in the paper.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1536,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        hidden_act: str = "relu2",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        attention_multiplier: float | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.attention_multiplier = attention_multiplier
        self.use_cache = use_cache
        super().__init__(**kwargs)


class ComplexRMSNorm(nn.Module):
    """x / sqrt(mean(re² + im²) + eps) over the complex features, re and im with own weights."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight_real = nn.Parameter(torch.ones(size))
        self.weight_imag = nn.Parameter(torch.ones(size))
        self.size, self.eps = size, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (..., 2 size), in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        factor = torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) / self.size + self.eps)
        weight = torch.cat([self.weight_real, self.weight_imag])
        return (weight * (wide * factor)).to(x.dtype)


def complex_relu2(x: torch.Tensor) -> torch.Tensor:
    """Return (re², im²) of (..., 2n), and 0 where re and im are both negative."""
    re, im = x.chunk(2, dim=-1)
    both_negative = (re < 0) & (im < 0)
    return torch.cat([part.masked_fill(both_negative, 0).square() for part in (re, im)], dim=-1)


def conjugate_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return conj(x) y of (..., 2n), elementwise."""
    (x_re, x_im), (y_re, y_im) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    return torch.cat([x_re * y_re + x_im * y_im, x_re * y_im - x_im * y_re], dim=-1)


def rotations(first: int, tokens: int, head_dim: int, theta: float, device: Any) -> Rope:
    """Return the rotations of ``tokens`` positions from ``first`` on.

    The angle of position p and complex feature j is p theta^(-j / head_dim).
    """
    features = torch.arange(head_dim, device=device) / head_dim
    positions = torch.arange(first, first + tokens, device=device).float()
    angle = positions[:, None] * (1.0 / theta**features)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Multiply (..., tokens, 2 head_dim) with e^(i angle)."""
    (re, im), (cos, sin) = x.chunk(2, dim=-1), (part.to(x.dtype) for part in rope)
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1)


class ComplexAttention(nn.Module):
    """Attention with scores Re(q conj(k)): real attention with heads [re, im]."""

    def __init__(self, config: ComplexNetConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.scale = config.attention_multiplier or self.head_dim**-0.5
        self.q_proj = ComplexLinear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = ComplexLinear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = ComplexLinear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = ComplexLinear(config.hidden_size, config.hidden_size)
        self.attn_layernorm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """Attend from x (batch, tokens, 2H); without a mask every token sees those before it."""
        q = rotate(self._by_head(self.q_proj(x), self.heads), rope)
        k = rotate(self._by_head(self.k_proj(x), self.kv_heads), rope)
        v = self._by_head(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        y = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and q.shape[2] > 1,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        # (batch, heads, tokens, [re, im], head_dim) -> (batch, tokens, [re, im], heads, head_dim)
        parts = y.unflatten(-1, (2, self.head_dim)).permute(0, 2, 3, 1, 4)
        return self.o_proj(self.attn_layernorm(parts.flatten(2)))

    def _by_head(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Return (batch, heads, tokens, 2 head_dim) of (batch, tokens, 2 heads head_dim)."""
        parts = x.unflatten(-1, (2, heads, self.head_dim))
        return parts.permute(0, 3, 1, 2, 4).flatten(3)


class ComplexMLP(nn.Module):
    """down(norm(conj(relu²(gate x)) up x))."""

    def __init__(self, config: ComplexNetConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = ComplexLinear(hidden, inner)
        self.up_proj = ComplexLinear(hidden, inner)
        self.down_proj = ComplexLinear(inner, hidden)
        self.ffn_layernorm = ComplexRMSNorm(inner, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward layer to (batch, tokens, 2H)."""
        gated = conjugate_product(complex_relu2(self.gate_proj(x)), self.up_proj(x))
        return self.down_proj(self.ffn_layernorm(gated))


class ComplexDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, config: ComplexNetConfig, index: int) -> None:
        super().__init__()
        self.self_attn = ComplexAttention(config, index)
        self.mlp = ComplexMLP(config)
        self.pre_layernorm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_layernorm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """Run one layer over x (batch, tokens, 2H)."""
        x = x + self.self_attn(self.pre_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_layernorm(x))


class ComplexNetLM(transformers.PreTrainedModel):
    """The language model; its name is the one published config.json files give."""

    config_class = ComplexNetConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ComplexDecoderLayer",)
    _supports_sdpa = True

    def __init__(self, config: ComplexNetConfig) -> None:
        super().__init__(config)
        self.token_embeddings_real = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_embeddings_imag = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = nn.ModuleList(
            [ComplexDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.final_norm = ComplexRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(2 * config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw real weights with the configured deviation, complex ones with it in all."""
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, ComplexLinear):
            nn.init.normal_(module.weight_real, std=deviation * 0.5**0.5)
            nn.init.normal_(module.weight_imag, std=deviation * 0.5**0.5)
        elif isinstance(module, ComplexRMSNorm):
            nn.init.ones_(module.weight_real)
            nn.init.ones_(module.weight_imag)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and the mean loss of predicting ``labels`` if there are any.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens so far), 0 for padding.
            past_key_values: a transformers `Cache`, which is appended to.
            labels: (batch, tokens), compared with the token before; -100 is left out.
            use_cache: make a cache where none is given.
            logits_to_keep: logits of the last tokens only; 0 for all.
        """
        cache = past_key_values if past_key_values is not None else kwargs.get("cache")
        if cache is None and use_cache and not self.training:
            cache = transformers.DynamicCache(config=self.config)
        before = cache.get_seq_length() if cache is not None else 0
        tokens, device = input_ids.shape[1], input_ids.device
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rope = rotations(before, tokens, head_dim, self.config.rope_theta, device)
        mask = _mask(attention_mask, before, tokens, device)
        x = torch.cat(
            [self.token_embeddings_real(input_ids), self.token_embeddings_imag(input_ids)], dim=-1
        )
        for layer in self.layer:
            x = layer(x, rope, mask, cache)
        logits = self.lm_head(self.final_norm(x[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE_FIELD: cache})


def _mask(
    padding: torch.Tensor | None, before: int, tokens: int, device: Any
) -> torch.Tensor | None:
    """Return which tokens see which, or None where plain causal attention says the same."""
    padded = padding is not None and not bool(padding.all())
    if not padded and (before == 0 or tokens == 1):
        return None
    seen = torch.ones(tokens, before + tokens, dtype=torch.bool, device=device).tril(before)
    if not padded:
        return seen
    seen = seen & padding[:, None, None, :].bool()
    # A row that sees nothing, of a padding token, would be NaN.
    own = torch.eye(before + tokens, dtype=torch.bool, device=device)[before:]
    return seen | own


transformers.AutoConfig.register(MODEL_TYPE, ComplexNetConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(ComplexNetConfig, ComplexNetLM, exist_ok=True)
