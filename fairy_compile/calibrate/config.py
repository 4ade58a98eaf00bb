"""`Calibration`: which text a model is calibrated on, and how."""

from __future__ import annotations

from dataclasses import dataclass

from fairy_compile.errors import FairyError

TOKENS = 65536


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    Attributes:
        text: text, jsonl or parquet file, directory of them, or a saved Hugging Face dataset.
        tokens: how many tokens of it to use, rounded down to whole windows.
        window: tokens the model sees at a time; None for its context, 2048 at most.
        text_field: key or column of the text in jsonl, parquet and datasets.
        tune: steps of `calibrate.tune`, 0 for none.

    Raises:
        FairyError: a value is outside what is allowed.
    """

    text: str
    tokens: int = TOKENS
    window: int | None = None
    text_field: str = "text"
    tune: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise FairyError(f"--calibrate-window is {self.window}; allowed: 2 or more")
        if self.tokens < 2:
            raise FairyError(f"--calibrate-tokens is {self.tokens}; allowed: 2 or more")
        if self.tune < 0:
            raise FairyError(f"--tune is {self.tune}; allowed: 0 or more steps")
