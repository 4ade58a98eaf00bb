"""`QuantConfig`: values, patterns, refusals."""

from __future__ import annotations

import pytest

from fairy_compile import FairyError, QuantConfig


@pytest.mark.parametrize(("quant", "stages"), [("w1", 1), ("w2", 2), ("w3", 3), ("w4", 4)])
def test_quant_names_the_number_of_stages(quant: str, stages: int) -> None:
    assert QuantConfig(quant).stages() == stages


def test_stages_for_overrides_by_first_matching_pattern() -> None:
    config = QuantConfig("w2", stages_for={"*.v_proj": 4, "*_proj": 1})
    assert config.stages("layers.0.v_proj") == 4
    assert config.stages("layers.0.q_proj") == 1
    assert config.stages("lm_head") == 2


def test_exempt_patterns() -> None:
    config = QuantConfig(exempt=("lm_head", "*.0.*"))
    assert config.is_exempt("lm_head")
    assert config.is_exempt("layers.0.q_proj")
    assert not config.is_exempt("layers.10.q_proj")


def test_json_round_trip() -> None:
    config = QuantConfig("w3", scale="row", exempt=("a",), stages_for={"b": 1})
    values = config.to_json()
    assert QuantConfig(**values | {k: tuple(values[k]) for k in ("terms", "exempt")}) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quant": "w5"}, r"--quant 'w5'.*w1, w2, w3, w4"),
        ({"quant": "W2"}, "Did you mean w2"),
        ({"scale": "column"}, "tensor, row, tile64"),
        ({"act": "int4"}, "int8, int16, float"),
        ({"method": "awq"}, "auto, phase"),
        ({"terms": ("W", "U")}, "terms"),
        ({"exempt": "lm_head"}, r"exempt is 'lm_head'; .*\('lm_head',\)"),
        ({"stages_for": {"x": 5}}, r"stages_for\['x'\] is 5"),
        ({"stages_for": {"x": True}}, "allowed"),
    ],
)
def test_refusals_name_value_and_choices(values: dict, words: str) -> None:
    with pytest.raises(FairyError, match=words):
        QuantConfig(**values)


@pytest.mark.parametrize("value", [None, 3, True, b"x", [1], {"a": 1}, ["a"]], ids=repr)
@pytest.mark.parametrize(
    "name", ["quant", "scale", "terms", "act", "method", "exempt", "stages_for"]
)
def test_values_of_other_types_are_refused_in_words(name: str, value: object) -> None:
    if (name, value) in (("exempt", ["a"]), ("stages_for", {"a": 1}), ("exempt", {"a": 1})):
        assert len(getattr(QuantConfig(**{name: value}), name)) == 1
        return
    with pytest.raises(FairyError, match="; allowed: "):
        QuantConfig(**{name: value})


def test_patterns_are_text() -> None:
    with pytest.raises(FairyError, match="pattern 3; allowed: text"):
        QuantConfig(stages_for={3: 1})
