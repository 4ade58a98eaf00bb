import pytest

from fairy_compile import FairyError
from fairy_compile.evaluation.windows import Window, choose_windows, cut_windows


def test_disjoint_windows_are_those_of_the_papers():
    assert cut_windows(35, 10, 10) == [Window(0, 10, 1), Window(10, 20, 11), Window(20, 30, 21)]
    assert cut_windows(30, 10, 10)[-1] == Window(20, 30, 21)


@pytest.mark.parametrize(("context", "stride"), [(10, 4), (10, 9), (10, 1), (7, 3)])
@pytest.mark.parametrize("tokens", [11, 12, 33, 40])
def test_sliding_windows_score_every_token_once_with_enough_before_it(tokens, context, stride):
    windows = cut_windows(tokens, context, stride)
    assert [t for w in windows for t in range(w.first, w.end)] == list(range(1, tokens))
    for window in windows:
        assert window.end - window.start <= context
        assert window.start < window.first
        assert window.first - window.start >= min(window.first, context - stride)


@pytest.mark.parametrize("stride", [10, 3])
def test_a_text_shorter_than_a_window_is_one(stride):
    assert cut_windows(10, 10, stride) == [Window(0, 10, 1)]
    assert cut_windows(2, 10, stride) == [Window(0, 2, 1)]


@pytest.mark.parametrize("tokens", [0, 1])
def test_nothing_to_score(tokens):
    with pytest.raises(FairyError, match=f"{tokens} token.* two or more"):
        cut_windows(tokens, 10, 10)


def test_defaults_and_limits():
    assert choose_windows(None, None, 4096) == (2048, 2048)
    assert choose_windows(None, None, 128) == (128, 128)
    assert choose_windows(64, 16, 128) == (64, 16)
    for context, stride, words in (
        (129, None, r"--context is 129 tokens; allowed for this model: 2 to 128"),
        (1, None, "--context is 1"),
        (64, 65, r"--stride is 65 tokens; allowed: 1 to 64"),
        (64, 0, "--stride is 0"),
    ):
        with pytest.raises(FairyError, match=words):
            choose_windows(context, stride, 128)
