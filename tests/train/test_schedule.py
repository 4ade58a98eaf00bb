from __future__ import annotations

import itertools

import pytest

from fairy_compile import FairyError, QuantConfig
from fairy_compile.train import TrainConfig
from fairy_compile.train.schedule import lr_factor, weight_decay


def factors(total=100, **changes):
    config = TrainConfig("m", "d", "o", warmup=0.1, lr_end=0.02, **changes)
    return [lr_factor(step, total, config) for step in range(total)], config


@pytest.mark.parametrize("schedule", ["wsd", "two-stage", "cosine"])
def test_warm_up_and_end(schedule):
    values, config = factors(schedule=schedule)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.02)
    assert max(values) == 1.0
    assert lr_factor(100, 100, config) == values[-1]
    assert lr_factor(0, 1, config) == pytest.approx(1.0)


def test_wsd_is_stable_and_then_falls_in_a_line():
    values, _ = factors(schedule="wsd", decay=0.2)
    assert values[10:80] == [1.0] * 70
    drops = [a - b for a, b in itertools.pairwise(values[79:])]
    assert drops == pytest.approx([0.98 / 20] * 20)


def test_two_stage_falls_restarts_lower_and_drops_weight_decay():
    values, config = factors(schedule="two-stage", weight_decay=0.1)
    assert values[49] == pytest.approx(0.5, abs=0.02)
    assert values[50] == pytest.approx(1 / 3)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    decays = [weight_decay(step, 100, config) for step in range(100)]
    assert decays == [0.1] * 50 + [0.0] * 50


def test_cosine_and_constant():
    values, _ = factors(schedule="cosine", total=111)
    middle = values[12 + (110 - 12) // 2]
    assert middle == pytest.approx(0.51)
    assert factors(schedule="constant")[0][10:] == [1.0] * 90


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": "wsc"}, "Did you mean"),
        ({"precision": "fp8"}, "allowed: auto, bf16, float32"),
        ({"batch": 0}, "--batch is 0; allowed: 1 or more"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"lr": 0.0}, "--lr is 0.0"),
        ({"seed": -1}, "--seed is -1; allowed: 0 to 4294967295"),
        ({"seed": 1 << 32}, "--seed is 4294967296"),
        ({"warmup": 0.9, "decay": 0.2}, "more than the whole run"),
        ({"distill": 1.5}, "--distill is 1.5"),
        ({"teacher": "x"}, "--distill"),
        ({"eval_share": -0.1}, "--eval-share"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(FairyError, match=words):
        TrainConfig("m", "d", "o", **changes)


def test_unknown_t_or_scale():
    with pytest.raises(FairyError, match="w1, w2, w3, w4"):
        TrainConfig("m", "d", "o", quant=QuantConfig("w7"))
    with pytest.raises(FairyError, match="tensor, row, tile64"):
        TrainConfig("m", "d", "o", quant=QuantConfig("w2", scale="column"))
