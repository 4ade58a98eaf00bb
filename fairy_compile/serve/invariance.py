"""How many rows one decode call may have without its results depending on them.

Kernels may choose other tables for more rows (README, Accuracy): then an answer would depend, in
its last bits, on how many others run beside it. Libraries for many sequences have a function that
avoids it (`Engine.decode` with ``exact``). Which widths are safe is a property of the kernels in
the artifact, so it is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fairy_compile.runtime.engine import Engine

# A long context and one of some pages, which attention could cut in another way side by side.
_PROMPT_TOKENS = (160, 40)
_OTHERS = 3


def invariant_rows(engine: Engine) -> int:
    """Return the most rows whose logits are bit for bit those of decoding one row at a time.

    Widths are halved from ``max_sequences`` until one agrees, 1 at last. Every sequence gets tokens
    of its own. The cache is left as it was.

    Args:
        engine: with no sequences.
    """
    rng = np.random.default_rng(0)
    count = engine.cache.max_sequences
    lengths = [*_PROMPT_TOKENS, *[_OTHERS] * count][:count]
    longest = max(1, min(engine.context, engine.cache.capacity // count) - 1)
    sequences = [engine.add_sequence() for _ in range(count)]
    try:
        for sequence, length in zip(sequences, lengths, strict=True):
            size = min(length, longest)
            engine.prefill(sequence, rng.integers(engine.vocab_size, size=size))
        tokens = rng.integers(engine.vocab_size, size=count)
        alone = []
        for sequence, token in zip(sequences, tokens, strict=True):
            alone.append(engine.decode([sequence], [token])[0])
            engine.popn(sequence, 1)
        expected = np.stack(alone)
        width = count
        while width > 1:
            together = engine.decode(sequences[:width], tokens[:width], exact=True)
            for sequence in sequences[:width]:
                engine.popn(sequence, 1)
            if np.array_equal(together, expected[:width]):
                return width
            width //= 2
        return 1
    finally:
        for sequence in sequences:
            engine.remove_sequence(sequence)
