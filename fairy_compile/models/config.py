"""`DecoderConfig`: the sizes of a decoder-only model, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.kernels.attention_shape import AttentionShape
from fairy_compile.kernels.base import Activation
from fairy_compile.models.rope import Rope, parse_rope
from fairy_compile.models.values import positive_float, positive_int
from fairy_compile.op.rope import RopeTable

KV_DTYPES = ("float16", "float32")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class ExpertNames:
    """What a family's checkpoints call the parts of a mixture of experts, below the layer.

    Attributes:
        block: the mixture.
        gate, up, down: parts of an expert.
    """

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a Llama-style decoder.

    Attributes mirror config.json; ``context`` is the longest sequence the model takes and
    ``context_reason`` says where that number came from. ``qkv_bias``, ``qk_norm`` and the like
    are set by the family file, not read from config.json, unless the family says so.
    ``attention_scale`` is the factor on attention scores, None for head_dim^-1/2. Models of complex
    numbers count real and imaginary parts: their sizes are those of the real maps. ``kv_dtype`` is
    the dtype of cached keys and values, ``act_dtype`` that of activations between kernels; the
    build chooses both, and narrows ``context`` to what it builds for.

    Layers with ``local_layers[layer]`` attend over a sliding window of ``window`` tokens, the
    query's own included, and rotate by ``local_rope`` if there is one. ``attention_softcap`` and
    ``logit_softcap`` are the caps of cap tanh(x / cap) on attention scores and on logits.

    Layers with ``sparse_layers[layer]``, or all if that is empty, have ``experts`` feed-forward
    layers of ``expert_size``, of which a token takes ``experts_per_token``, with weights that sum
    to 1 if ``normalize_experts``; ``expert_names`` is None without any. ``wide_activations`` says
    that published models of the family were trained in bfloat16 and have hidden states beyond
    float16's 65504.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    context: int
    context_reason: str
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    kv_dtype: str = "float32"
    act_dtype: str = "float32"
    activation: Activation = "silu"
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    sparse_layers: tuple[bool, ...] = ()
    normalize_experts: bool = True
    expert_names: ExpertNames | None = None
    wide_activations: bool = False

    def is_local(self, layer: int) -> bool:
        """Tell whether a layer attends over the sliding window only."""
        return bool(self.local_layers) and self.local_layers[layer]

    @property
    def attention_shape(self) -> AttentionShape:
        """Sizes of attention over the cache."""
        return AttentionShape(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.kv_dtype,
            window=self.window,
            softcap=self.attention_softcap,
        )

    def is_sparse(self, layer: int) -> bool:
        """Tell whether a layer is a mixture of experts."""
        return self.experts > 0 and (not self.sparse_layers or self.sparse_layers[layer])

    def rope_table(self, layer: int = 0) -> RopeTable:
        """Return the angles of a layer."""
        local = self.local_rope is not None and self.is_local(layer)
        rope = self.local_rope if local and self.local_rope else self.rope
        return rope.table(self.head_dim, self.context)


def parse_decoder(
    config: Mapping[str, Any], local: Callable[[int], bool] | None = None, **family: Any
) -> DecoderConfig:
    """Build a `DecoderConfig` from a config.json; ``family`` sets what the family fixes.

    Args:
        config: config.json.
        local: layer -> whether it attends over ``sliding_window`` tokens, where ``layer_types``
            does not say; None for families without windows.
        family: further fields.

    Raises:
        ModelFileError: a size is missing, not an integer, or inconsistent.
        UnsupportedError: an activation or rope type this version does not have.
    """
    hidden = positive_int(config, "hidden_size")
    heads = positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    head_dim = positive_int(config, "head_dim", max(1, hidden // heads))
    if heads % kv_heads:
        raise ModelFileError(
            f"config.json has {heads} attention heads and {kv_heads} key/value heads; the first "
            "must be a multiple of the second"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ModelFileError(
            f"config.json has hidden_size {hidden}, which {heads} attention heads do not divide"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    context = positive_int(config, "max_position_embeddings", 2048)
    layers = positive_int(config, "num_hidden_layers")
    rope = family.pop("rope", None) or parse_rope(config)
    if rope.kind == "dynamic":
        context = int(context * rope.settings["factor"])
    window = None if local is None else config.get("sliding_window")
    if local is not None and window is not None:
        window = positive_int(config, "sliding_window")
        local_layers = _local_layers(config, layers, local)
        if any(local_layers):
            family |= {"window": window, "local_layers": local_layers}
    return DecoderConfig(
        model_type=str(config.get("model_type")),
        hidden_size=hidden,
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive_int(config, "vocab_size"),
        rms_norm_eps=positive_float(config, "rms_norm_eps", 1e-6),
        rope=rope,
        context=context,
        context_reason="of the model",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        activation=_ACTIVATIONS[activation],
        **family,
    )


def at_context(config: DecoderConfig, context: int) -> DecoderConfig:
    """Return the model for sequences of at most ``context`` tokens."""
    config = replace(config, context=context)
    if config.window is None or config.window < context:
        return config
    # The layers stay local: they may rotate by angles of their own.
    return replace(config, window=None)


_LAYER_TYPES = {"sliding_attention": True, "full_attention": False}


def _local_layers(
    config: Mapping[str, Any], layers: int, local: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Return which layers have windows: as ``layer_types`` of config.json says, else ``local``."""
    types = config.get("layer_types")
    if types is None:
        return tuple(local(layer) for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise ModelFileError(
            f"config.json has layer_types = {str(types)[:80]}; expected one for each of its "
            f"{layers} layers"
        )
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise UnsupportedError(
                f"config.json has a layer of type {kind!r}; supported: {', '.join(_LAYER_TYPES)}"
            )
    return tuple(_LAYER_TYPES[kind] for kind in types)
