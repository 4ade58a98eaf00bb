"""Calibration text: what is taken, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fairy_compile.calibrate.config import Calibration
from fairy_compile.calibrate.windows import read_windows
from fairy_compile.errors import FairyError


def test_windows_are_spread_over_the_text(checkpoint, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:05d}" for i in range(4000)))
    few = read_windows(checkpoint, Calibration(str(path), tokens=64, window=16))
    everything = read_windows(checkpoint, Calibration(str(path), tokens=1 << 20, window=16))
    assert few.shape == (4, 16)
    assert few.dtype == np.uint32
    rows = [next(i for i, w in enumerate(everything) if (w == window).all()) for window in few]
    # 16 times the tokens asked for are 64 windows, and these the middles of their quarters.
    assert rows == [8, 24, 40, 56]


def test_the_default_window_is_the_context(checkpoint, text):
    context = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    windows = read_windows(checkpoint, Calibration(str(text), tokens=2 * context + 5))
    assert windows.shape == (2, context)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 10_000}, "longer than the model's context of 256"),
        ({"tokens": 100}, "less than one window of 256"),
        ({"window": 1}, "--calibrate-window is 1"),
        ({"tokens": 0}, "--calibrate-tokens is 0"),
        ({"tune": -1}, "--tune is -1"),
    ],
)
def test_bad_sizes(checkpoint, text, options, words):
    with pytest.raises(FairyError, match=words):
        read_windows(checkpoint, Calibration(str(text), **options))


def test_bad_text(checkpoint, tmp_path):
    def read(content):
        path = tmp_path / "text.txt"
        path.write_text(content)
        return read_windows(checkpoint, Calibration(str(path), window=32))

    with pytest.raises(FairyError, match="hold no text"):
        read("")
    with pytest.raises(FairyError, match=r"is \d+ tokens, less than one window of 32"):
        read("x = 1")
    with pytest.raises(FairyError, match="there is no data"):
        read_windows(checkpoint, Calibration(str(tmp_path / "missing")))


def test_tokenizer_of_another_model(make_checkpoint, text):
    directory = make_checkpoint(vocab_size=64)
    with pytest.raises(FairyError, match="vocabulary is 64 tokens"):
        read_windows(directory, Calibration(str(text), window=32))
