"""Reading config.json: sizes, rope settings, refusals."""

from __future__ import annotations

import pytest

from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.models import parse_config
from fairy_compile.models.config import at_context
from fairy_compile.models.rope import Rope

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "sliding_window_pattern": 2}
LLAMA3_VALUES = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_defaults_of_llama_1() -> None:
    config = parse_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.context) == (4, 16, 512)
    assert config.rope == Rope(10000.0)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_rope_settings_in_every_spelling(key: str, type_key: str) -> None:
    linear = parse_config(LLAMA | {key: {type_key: "linear", "factor": 4.0}})
    assert linear.rope == Rope(10000.0, "linear", {"factor": 4.0})
    llama3 = parse_config(LLAMA | {key: {type_key: "llama3", **LLAMA3_VALUES}})
    assert (llama3.rope.kind, llama3.rope.settings) == ("llama3", LLAMA3_VALUES)


def test_rope_theta_may_sit_in_the_rope_parameters() -> None:
    config = parse_config(
        LLAMA | {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    )
    assert config.rope.theta == 5e5


@pytest.mark.parametrize(
    ("changes", "local"),
    [
        ({"model_type": "mistral"}, (True, True)),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, ()),
        ({"model_type": "phi3"}, (True, True)),
        ({"model_type": "llama"}, ()),
        ({"model_type": "qwen2", "use_sliding_window": False}, ()),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            (False, True),
        ),
        ({"model_type": "gemma2"}, (True, False)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, (True, False)),
        ({"model_type": "gemma3_text"}, (True, True)),
    ],
)
def test_which_layers_have_sliding_windows(changes: dict, local: tuple[bool, ...]) -> None:
    config = parse_config(LLAMA | {"sliding_window": 128} | changes)
    assert (config.window, config.local_layers) == ((128, local) if local else (None, ()))
    assert config.context == 512


def test_windows_that_no_context_fills_are_dropped() -> None:
    config = parse_config(LLAMA | {"model_type": "mistral", "sliding_window": 128})
    assert at_context(config, 128).window is None
    assert at_context(config, 129).window == 128


def test_gemma_3_has_two_ropes() -> None:
    new = parse_config(GEMMA3 | {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }})  # fmt: skip
    old = parse_config(
        GEMMA3
        | {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        | {"rope_local_base_freq": 2e4}
    )
    assert (new.rope, new.local_rope) == (old.rope, old.local_rope)
    assert old.rope == Rope(1e6, "linear", {"factor": 8.0})
    assert old.local_rope == Rope(2e4)


def test_dynamic_and_longrope_stay_in_their_native_context_unless_asked() -> None:
    dynamic = parse_config(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert (dynamic.context, dynamic.rope.native_context) == (2048, 512)
    plain = Rope(10000.0).table(16, 512)
    assert dynamic.rope.table(16, 512) == plain != dynamic.rope.table(16, 513)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = parse_config(
        LLAMA
        | {"model_type": "phi3", "original_max_position_embeddings": 128}
        | {"rope_scaling": {"type": "su", **factors}}
    )
    assert (longrope.context, longrope.rope.native_context) == (512, 128)
    short, long = (longrope.rope.table(16, n) for n in (128, 129))
    assert short.frequencies == plain.frequencies
    assert long.frequencies[0] == 0.5
    assert short.amplitude == long.amplitude == pytest.approx((1 + 2 / 7) ** 0.5)


def test_mixtures_of_experts() -> None:
    config = parse_config(
        LLAMA
        | {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3}
        | {"moe_intermediate_size": 32, "mlp_only_layers": [1], "norm_topk_prob": True}
    )
    assert (config.experts, config.experts_per_token, config.expert_size) == (6, 3, 32)
    assert [config.is_sparse(layer) for layer in (0, 1)] == [True, False]
    mixtral = parse_config(LLAMA | {"model_type": "mixtral"})
    assert (mixtral.experts, mixtral.experts_per_token, mixtral.expert_size) == (8, 2, 160)


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
            "'gpt2'.*complexnet, gemma2, gemma3_text, llama, mistral, mixtral, olmo2, phi3, qwen2",
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
        ({"hidden_act": []}, UnsupportedError, r"\[\].*silu"),
        ({"rms_norm_eps": float("nan")}, ModelFileError, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "mrope"}}, UnsupportedError, "'mrope'.*default, linear"),
        ({"rope_scaling": {"type": "yarn", "factor": "big"}}, ModelFileError, "factor = 'big'"),
        ({"rope_scaling": {"type": "longrope"}}, ModelFileError, "short_factor = None"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, -1]}},
            ModelFileError,
            "short_factor = -1",
        ),
        (
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 1},
            ModelFileError,
            "original_max_position_embeddings = 1; expected 2 or more",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, ModelFileError, "sliding_window = 0"),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention"]},
            ModelFileError,
            "each of its 2 layers",
        ),
        (
            {"model_type": "gemma2", "layer_types": ["full_attention", "chunked"]},
            UnsupportedError,
            "'chunked'.*sliding_attention",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            UnsupportedError,
            "use_bidirectional_attention",
        ),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            ModelFileError,
            "9 experts .* of 8",
        ),
        ({"rope_scaling": {"type": "linear"}}, ModelFileError, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ModelFileError, "factor = 0"),
        ({"rope_scaling": "linear"}, ModelFileError, "object"),
        ({"partial_rotary_factor": 1.5}, ModelFileError, r"partial_rotary_factor = 1\.5"),
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


@pytest.mark.parametrize(("head_dim", "fraction"), [(7, 1.0), (16, 0.2), (16, 0.05)])
def test_odd_numbers_of_rotated_elements_are_refused(head_dim: int, fraction: float) -> None:
    with pytest.raises(UnsupportedError, match="even number"):
        Rope(10000.0, fraction=fraction).table(head_dim, 64)


def test_factors_of_another_head_size_are_refused() -> None:
    factors = {"short_factor": (1.0,) * 8, "long_factor": (1.0,) * 8}
    with pytest.raises(ModelFileError, match="8 values in short_factor; its heads have 16 pairs"):
        Rope(10000.0, "longrope", factors).table(32, 64)
