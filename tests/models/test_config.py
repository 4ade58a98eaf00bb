"""Reading config.json: sizes, rope settings, refusals."""

from __future__ import annotations

import pytest

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.models import parse_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
LLAMA3_VALUES = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults_of_llama_1() -> None:
    config = parse_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.context) == (4, 16, 512)
    assert (config.rope.theta, config.rope.scale, dict(config.rope.scaling)) == (10000.0, 1.0, {})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_rope_settings_in_every_spelling(key: str, type_key: str) -> None:
    linear = parse_config(LLAMA | {key: {type_key: "linear", "factor": 4.0}})
    assert linear.rope.scale == 0.25
    llama3 = parse_config(LLAMA | {key: {type_key: "llama3", **LLAMA3_VALUES}})
    assert llama3.rope.scaling == {"rope_type": "llama3", **LLAMA3_VALUES}


def test_rope_theta_may_sit_in_the_rope_parameters() -> None:
    config = parse_config(
        LLAMA | {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    assert config.rope.theta == 5e5


def test_mistral_context_ends_at_the_sliding_window() -> None:
    config = parse_config(LLAMA | {"model_type": "mistral", "sliding_window": 128})
    assert config.context == 128
    assert "sliding window" in config.context_reason


def test_qwen2_ignores_a_window_it_does_not_use() -> None:
    values = {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}
    assert parse_config(LLAMA | values).context == 512


def test_family_switches() -> None:
    assert parse_config(LLAMA | {"model_type": "qwen2"}).qkv_bias
    assert not parse_config(LLAMA | {"model_type": "qwen2"}).o_bias
    qwen3 = parse_config(LLAMA | {"model_type": "qwen3", "head_dim": 32})
    assert (qwen3.qk_norm, qwen3.head_dim) == (True, 32)
    assert parse_config(LLAMA | {"attention_bias": True}).o_bias


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"model_type": "gpt2"},
            UnsupportedError,
            "'gpt2'.*complexnet, llama, mistral, olmo2, qwen2",
        ),
        ({"model_type": None}, UnsupportedError, "None"),
        ({"hidden_size": 0}, ModelFileError, "hidden_size = 0"),
        ({"hidden_size": -4}, ModelFileError, "hidden_size = -4"),
        ({"hidden_size": 64.0}, ModelFileError, r"hidden_size = 64\.0"),
        ({"hidden_size": True}, ModelFileError, "hidden_size = True"),
        ({"hidden_size": 1 << 40}, ModelFileError, "hidden_size"),
        ({"vocab_size": "many"}, ModelFileError, "vocab_size = 'many'"),
        ({"num_hidden_layers": None}, ModelFileError, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, ModelFileError, "multiple"),
        ({"hidden_size": 66}, ModelFileError, "divide"),
        ({"hidden_act": "gelu"}, UnsupportedError, "'gelu'.*silu"),
        ({"rms_norm_eps": float("nan")}, ModelFileError, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "yarn"}}, UnsupportedError, "'yarn'.*default, linear"),
        ({"rope_scaling": {"type": "linear"}}, ModelFileError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ModelFileError, "factor = 0"),
        ({"rope_scaling": "linear"}, ModelFileError, "object"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, r"0\.5"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3_VALUES, "high_freq_factor": 1.0}},
            ModelFileError,
            "high_freq_factor",
        ),
    ],
)
def test_refusals_name_key_and_value(changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        parse_config(LLAMA | changes)
