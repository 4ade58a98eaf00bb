"""Calibration text as windows of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairy_compile.calibrate.config import Calibration
from fairy_compile.errors import FairyError
from fairy_compile.frontends.files import read_config
from fairy_compile.train.blocks import check_vocabulary, read_tokens
from fairy_compile.train.inputs import end_token, vocabulary

_WINDOW = 2048
# Windows are taken evenly from this many times the tokens asked for: text at the beginning of a
# corpus may be all of one kind, and tokenising all of a large one takes long.
_SPREAD = 16


def read_windows(directory: Path, calibration: Calibration) -> np.ndarray:
    """Return tokens, uint32 (windows, length), evenly spread over the beginning of the text.

    Args:
        directory: of the model and its tokenizer.
        calibration: what to read.

    Raises:
        FairyError: the text is missing, empty or shorter than a window, or the tokenizer is not
            the model's.
    """
    check_vocabulary(directory, vocabulary(directory))
    length = _window(directory, calibration)
    tokens = read_tokens(
        calibration.text,
        directory,
        eos=end_token(directory, directory),
        field=calibration.text_field,
        limit=_SPREAD * calibration.tokens,
    )
    there = len(tokens) // length
    if there == 0:
        raise FairyError(
            f"the calibration text {calibration.text} is {len(tokens)} tokens, less than one "
            f"window of {length}; give more text, or a smaller --calibrate-window"
        )
    count = min(there, calibration.tokens // length)
    chosen = (np.arange(count) + 0.5) * there / count
    return tokens[: there * length].reshape(there, length)[chosen.astype(np.int64)]


def _window(directory: Path, calibration: Calibration) -> int:
    """Return the length of a window, checked against the model's context and the tokens."""
    longest = read_config(directory).get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 2:
        longest = _WINDOW
    length = min(_WINDOW, longest) if calibration.window is None else calibration.window
    if length > longest:
        raise FairyError(
            f"--calibrate-window {length} is longer than the model's context of {longest} tokens; "
            f"allowed: 2 to {longest}"
        )
    if calibration.tokens < length:
        raise FairyError(
            f"--calibrate-tokens {calibration.tokens} is less than one window of {length} tokens; "
            f"allowed: {length} and more, or a smaller --calibrate-window"
        )
    return length
