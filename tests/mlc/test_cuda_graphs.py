"""Decode steps that replay CUDA graphs in MLC's engine, on a simulated CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

import fairy_compile as fc
from tests.emulation import cuda_graphs
from tests.mlc.engine import MlcEngine
from tests.mlc.test_greedy import prompts
from tests.tiny_models import Oracle, save_model

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recorded_steps_of_any_number_of_sequences(build, tmp_path: Path, family: str) -> None:
    """What was recorded for one text is replayed for others, whose pages lie elsewhere."""
    recorder = cuda_graphs.install()
    source = save_model(tmp_path / "model", family)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    want = [oracle.greedy(prompt, STEPS) for prompt in prompts()]
    engine = MlcEngine(build("cuda", source, cuda_graphs=True), "cuda")
    replayed = recorder.replayed
    for which in ([0], [1, 2], [2, 0, 1], [1]):
        answers = engine.generate([prompts()[i] for i in which], temperature=0, max_tokens=STEPS)
        assert [choices[0].tokens for choices in answers] == [want[i] for i in which]
    assert recorder.replayed > replayed
