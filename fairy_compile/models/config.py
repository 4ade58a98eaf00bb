"""`DecoderConfig`: the sizes of a decoder-only model, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairy_compile.errors import ModelFileError, UnsupportedError

# Rope types, by what this version lowers them to.
ROPE_TYPES = ("default", "linear", "llama3")
KV_DTYPES = ("float16", "float32")
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LIMIT = 1 << 24


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scale: factor on positions (1/factor for type ``linear``, else 1).
        scaling: TVM's description of a frequency rule, ``{}`` for the plain one.
    """

    theta: float
    scale: float = 1.0
    scaling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a Llama-style decoder.

    Attributes mirror config.json; ``context`` is the longest sequence the model takes and
    ``context_reason`` says where that number came from. ``qkv_bias``, ``qk_norm`` and the like
    are set by the family file, not read from config.json, unless the family says so.
    ``kv_dtype`` is the dtype of cached keys and values, ``act_dtype`` that of activations between
    kernels; the build chooses both.
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
    kv_dtype: str = "float32"
    act_dtype: str = "float32"


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return config[key] if it is a positive integer of sane size, else raise `ModelFileError`."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LIMIT:
        raise ModelFileError(
            f"config.json has {key} = {value!r}; expected an integer from 1 to {_LIMIT - 1}"
        )
    return value


def positive_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return config[key] if it is a positive finite number, else raise `ModelFileError`."""
    value = config.get(key)
    if value is None:
        value = default
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not 0 < float(value) < 1e12:
        raise ModelFileError(f"config.json has {key} = {value!r}; expected a positive number")
    return float(value)


def parse_rope(config: Mapping[str, Any]) -> Rope:
    """Read rope settings in either spelling: ``rope_scaling`` or ``rope_parameters``.

    Raises:
        UnsupportedError: a rope type this version does not lower; the message lists those it does.
        ModelFileError: a value is missing or out of range.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ModelFileError(f"config.json has rope settings {settings!r}; expected an object")
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta_from = settings if "rope_theta" in settings else config
    theta = positive_float(theta_from, "rope_theta", 10000.0)
    partial = config.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if partial != 1.0:
        raise UnsupportedError(
            f"partial_rotary_factor {partial!r} is not supported; supported: 1.0"
        )
    if kind == "linear":
        return Rope(theta, 1.0 / positive_float(settings, "factor"))
    if kind == "llama3":
        scaling = {key: positive_float(settings, key) for key in ("factor", *_LLAMA3_KEYS)}
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise ModelFileError(
                "config.json has high_freq_factor <= low_freq_factor in its llama3 rope settings"
            )
        return Rope(theta, 1.0, {"rope_type": "llama3", **scaling})
    return Rope(theta)


def parse_decoder(config: Mapping[str, Any], **family: Any) -> DecoderConfig:
    """Build a `DecoderConfig` from a config.json; ``family`` sets what the family fixes.

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
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"activation {activation!r} is not supported; supported: silu")
    context, reason = positive_int(config, "max_position_embeddings", 2048), "of the model"
    window = config.get("sliding_window")
    uses_window = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if window is not None and uses_window and window < context:
        # Inside the window sliding-window attention is full attention, so this stays exact.
        context = positive_int(config, "sliding_window")
        reason = "the sliding window; longer contexts need sliding-window attention"
    return DecoderConfig(
        model_type=str(config.get("model_type")),
        hidden_size=hidden,
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive_int(config, "vocab_size"),
        rms_norm_eps=positive_float(config, "rms_norm_eps", 1e-6),
        rope=parse_rope(config),
        context=context,
        context_reason=reason,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **family,
    )
