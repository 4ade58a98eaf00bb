"""Whole models on a GPU, through the runner, against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

import fairy_compile as fc
from tests.gpu.cases import BATCHES, CASES, LAYERS, LENGTHS, MAX_BATCH, STEPS, Case, prompts, tokens

pytestmark = pytest.mark.gpu

# Relative errors of logits: float32 throughout, or activations, caches and prefill's weights in
# float16.
FLOAT32, FLOAT16 = 1e-4, 2e-3
# Activations and prefill's weights in bfloat16: roundings by at most 2^-8 of what is rounded, ten
# of activations a layer and three of the weights of each call, see
# tests/emulation/test_bfloat16_models.py.
BFLOAT16 = math.sqrt(10 * LAYERS + 2 + 3 * (4 * LAYERS + 1)) * 2.0**-8
# When decoding, int8 rounds activations in groups of 128 to 1/127 of their peak, see
# tests/models/test_parity.py: a call errs by (peak/rms) / (127 sqrt(12)), peak/rms <= sqrt(128),
# and a token passes four calls a layer and the head.
INT8 = math.sqrt(4 * LAYERS + 1) * math.sqrt(128) / (127 * math.sqrt(12))
DECODE = {"float": FLOAT32, "int16": FLOAT16, "int8": INT8}


def decode_error(case: Case) -> float:
    """Return what decoding may be off by."""
    return max(DECODE[case.act], BFLOAT16 if case.act_dtype == "bfloat16" else 0.0)


def error(seen: np.ndarray, want: np.ndarray) -> float:
    """Return ||seen - want|| / ||want||; infinite if a number is none."""
    ratio = float(np.linalg.norm(seen - want) / np.linalg.norm(want))
    return ratio if math.isfinite(ratio) else math.inf


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def loaded(request: pytest.FixtureRequest, built) -> Iterator[tuple]:
    """Yield (case, model, PyTorch's results)."""
    case = request.param
    out = built(case)
    with (
        np.load(out / "want.npz") as want,
        fc.load(out, max_sequences=MAX_BATCH, kv_tokens=MAX_BATCH * 64) as model,
    ):
        yield case, model, want


def test_prefill_of_any_length(loaded) -> None:
    case, model, want = loaded
    text = tokens(case.family)
    allowed = FLOAT32 if case.act == "float" else FLOAT16
    allowed = BFLOAT16 if case.act_dtype == "bfloat16" else allowed
    # A chunk of few rows is multiplied by the kernels of decode.
    few = max(allowed, decode_error(case))
    for length in LENGTHS:
        got = model.logits(text[:length].tolist())
        assert error(got, want["logits"][:length]) <= (allowed if length > 16 else few), length


def test_token_by_token(loaded) -> None:
    """Every step after the first replays the graphs that it recorded."""
    case, model, want = loaded
    engine, text = model.engine, tokens(case.family)
    sequence = engine.add_sequence()
    got = [engine.prefill(sequence, text[:3])]
    got += [engine.decode([sequence], [token])[0] for token in text[3:40]]
    engine.remove_sequence(sequence)
    assert error(np.array(got), want["logits"][2:40]) <= decode_error(case)


def test_batches(loaded) -> None:
    """Each row, in two steps whose sequences change places: what was recorded holds no row."""
    case, model, want = loaded
    engine, texts = model.engine, prompts(case.family)
    for batch in BATCHES:
        for order in (list(range(batch)), list(range(batch))[::-1]):
            ids = {i: engine.add_sequence() for i in order}
            engine.prefill_many({ids[i]: texts[i][:-1] for i in order})
            got = engine.decode([ids[i] for i in order], [texts[i][-1] for i in order])
            for row, i in enumerate(order):
                assert error(got[row], want["batch"][i]) <= 1.5 * decode_error(case), (batch, i)
                engine.remove_sequence(ids[i])


def test_long_contexts_that_share_pages(loaded) -> None:
    """Parts of contexts, which a graph of its own merges, and a fork in the middle of a page."""
    case, model, want = loaded
    engine, text = model.engine, tokens(case.family).tolist()
    parent = engine.add_sequence()
    engine.prefill(parent, text[:320])
    child = engine.fork(parent, 250)
    ends = {parent: 320, child: 250}
    for step in range(8):
        for sequence in [parent] if step < 2 else [child, parent]:
            got = engine.decode([sequence], [text[ends[sequence]]])[0]
            allowed = decode_error(case)
            assert error(got, want["logits"][ends[sequence]]) <= allowed, (sequence, step)
            ends[sequence] += 1
    order = [child, parent]
    got = engine.decode(order, [text[ends[sequence]] for sequence in order])
    for row, sequence in zip(got, order, strict=True):
        assert error(row, want["logits"][ends[sequence]]) <= 1.5 * decode_error(case)
        engine.remove_sequence(sequence)


def test_greedy_tokens_equal_pytorch(loaded) -> None:
    case, model, want = loaded
    if case.act != "float" or case.act_dtype == "bfloat16":
        pytest.skip("activations are rounded: a token may differ where two are nearly as likely")
    engine = model.engine
    sequence = engine.add_sequence()
    logits, found = engine.prefill(sequence, tokens(case.family)[:5]), []
    for _ in range(STEPS):
        found.append(int(np.argmax(logits)))
        logits = engine.decode([sequence], found[-1:])[0]
    engine.remove_sequence(sequence)
    assert found == want["greedy"].tolist()
