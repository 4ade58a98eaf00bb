import pytest

from fairy_compile.bench.spread import Spread
from fairy_compile.bench.workload import Settings, Workload, alternate, parse_lengths, tokens
from fairy_compile.errors import FairyError


def test_names_follow_llama_bench():
    assert Workload(512, 0).name == "pp512"
    assert Workload(0, 128).name == "tg128"
    assert Workload(0, 128, 1024).name == "tg128 @ d1024"


def test_workloads_are_the_product_of_depths_and_lengths():
    settings = Settings(n_prompt=(8, 16), n_gen=(0, 4), depth=(0, 32))
    names = ["pp8", "pp16", "tg4"]
    assert [w.name for w in settings.workloads()] == names + [f"{n} @ d32" for n in names]
    assert settings.context == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_prompt": (0,), "n_gen": (0,)}, "nothing to run"),
        ({"n_prompt": (-1,)}, "--n-prompt is -1"),
        ({"depth": (1 << 30,)}, "--depth is"),
        ({"repetitions": 0}, "--repetitions is 0; allowed: 1"),
        ({"batch": 0}, "--batch is 0"),
        ({"cooldown": -1.0}, "--cooldown is -1.0"),
        ({"cooldown": float("nan")}, "--cooldown is nan"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(FairyError, match=message):
        Settings(**changes)


def test_lists_of_lengths():
    assert parse_lengths("-p", "128,512") == (128, 512)
    with pytest.raises(FairyError, match="-p is '128,'; allowed: a whole number"):
        parse_lengths("-p", "128,")


def test_turns_are_mirrored():
    assert list(alternate("a", "b", 3)) == ["a", "b", "b", "a", "a", "b"]


def test_both_programs_get_the_same_tokens():
    assert tokens(100, 50) == tokens(100, 50)
    assert tokens(100, 80)[:50] == tokens(100, 50)
    assert set(tokens(3, 100)) == {0, 1, 2}


def test_spread():
    spread = Spread.of([1.0, 2.0, 6.0])
    assert (spread.mean, spread.median, spread.low, spread.high) == (3.0, 2.0, 1.0, 6.0)
    assert spread.stddev == pytest.approx(7**0.5)
    assert Spread.of([5.0]).stddev == 0.0
