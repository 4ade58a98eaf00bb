"""Which layers are linear, and which of those become phase codes."""

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends.plan import BY_RULE, is_linear, plan_weight, quantize_layer
from fairy_compile.phase import quantize


@pytest.mark.parametrize(
    ("name", "shape", "linear"),
    [
        ("lm_head.weight", (10, 8), True),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), True),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.self_attn.q_norm.weight", (8,), False),
        ("model.norm.weight", (1, 8), False),
        ("model.embed_tokens.weight", (10, 8), False),
        ("transformer.wte.weight", (10, 8), False),
        ("model.layers.0.conv.weight", (8, 8, 3), False),
        ("model.layers.0.scale", (8, 8), False),
    ],
)
def test_which_tensors_are_linear(name, shape, linear):
    assert is_linear(name, shape) is linear


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        ("lm_head", (33, 8), "odd dimension 33"),
        ("lm_head", (8, 7), "odd dimension 7"),
        ("lm_head", (0, 8), "empty"),
        ("model.embed_tokens", (8, 8), "not a linear layer"),
        ("model.layers.0.mlp.gate", (8, 8), "exempt by pattern '*.gate'"),
    ],
)
def test_reasons_to_stay_dense(layer, shape, reason):
    plan = plan_weight(layer, shape, QuantConfig(exempt=("x", "*.gate")))
    assert (plan.phase, plan.stages, plan.terms, plan.reason) == (False, 0, (), reason)


def test_phase_plan_follows_the_config():
    quant = QuantConfig("w1", scale="row", stages_for={"lm_*": 3})
    head, other = (plan_weight(name, (8, 8), quant) for name in ("lm_head", "q_proj"))
    assert (head.phase, head.stages, other.stages) == (True, 3, 1)
    assert (other.terms, other.scale, other.reason) == (("U", "W"), "row", BY_RULE)


def test_terms_of_a_complex_model_are_refused():
    with pytest.raises(UnsupportedError, match=r"q_proj is a real matrix"):
        plan_weight("q_proj", (8, 8), QuantConfig(terms=("W",)))


def test_baked_weights_are_recovered_and_others_quantised():
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    tensor, how = quantize_layer(weight, "q_proj", QuantConfig())
    assert how == BY_RULE
    np.testing.assert_array_equal(tensor.codes, quantize(weight).codes)
    again, how = quantize_layer(tensor.dequantize(), "q_proj", QuantConfig())
    assert how == "recovered from a weight that holds phase values"
    np.testing.assert_array_equal(again.codes, tensor.codes)
    np.testing.assert_allclose(again.scales, tensor.scales, rtol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_too_large_weights_are_named(dtype):
    weight = np.full((64, 64), 2.0**127, np.float32).astype(dtype)
    with pytest.raises(
        FairyError, match=r"q_proj holds 1\.701e\+38 at \(0, 0\); allowed: up to 1\.7"
    ):
        quantize_layer(weight, "q_proj", QuantConfig())
    largest = np.random.default_rng(0).choice([-1.6e38, 1e38], (64, 64)).astype(dtype)
    assert np.isfinite(quantize_layer(largest, "q_proj", QuantConfig())[0].scales).all()
