"""Exact decode of mixtures of experts: a row's logits do not depend on the rows beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.tiny_models import SIZES, save_model

ROWS = 12  # from 9 rows on, kernels of ordinary decode calls differ from those of one row


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_exact_decode_gives_every_row_the_bits_it_has_alone(tmp_path: Path, family: str) -> None:
    source = save_model(tmp_path / "model", family)
    out = tmp_path / "out"
    fc.build(source, quant="w2", act="int8", output=out, context=64, max_batch=ROWS)
    rng = np.random.default_rng(5)
    # Equal rows go to the same experts, which so get one row, a few, and more than 8.
    prompts = [[5, 6, 7]] * (ROWS - 2) + rng.integers(0, SIZES["vocab_size"], (2, 3)).tolist()
    tokens = [9] * (ROWS - 2) + rng.integers(0, SIZES["vocab_size"], 2).tolist()
    with fc.load(out, max_sequences=ROWS) as model:
        engine = model.engine
        ids = [engine.add_sequence() for _ in prompts]
        for sequence, prompt in zip(ids, prompts, strict=True):
            engine.prefill(sequence, prompt)

        def decode(count: int, exact: bool) -> np.ndarray:
            logits = engine.decode(ids[:count], tokens[:count], exact=exact)
            for sequence in ids[:count]:
                engine.popn(sequence, 1)
            return logits

        alone = []
        for sequence, token in zip(ids, tokens, strict=True):
            alone.append(engine.decode([sequence], [token])[0])
            engine.popn(sequence, 1)
        for count in (2, 9, ROWS):
            np.testing.assert_array_equal(decode(count, exact=True), np.stack(alone[:count]))
        if engine.library.has("batch_decode_exact"):  # of kernels that need it
            assert not np.array_equal(decode(ROWS, exact=False), np.stack(alone))
