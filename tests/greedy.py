"""Greedy decoding through the engine, so that no stop token ends it early."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fairy_compile.runtime.model import Model


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """Return the ``count`` likeliest tokens that follow ``prompt``, one after the other."""
    engine = model.engine
    sequence = engine.add_sequence()
    logits, tokens = engine.prefill(sequence, prompt), []
    for _ in range(count):
        tokens.append(int(np.argmax(logits)))
        logits = engine.decode([sequence], tokens[-1:])[0]
    return tokens
