"""Decode steps that replay CUDA graphs in MLC's engine.

On a simulated device their results are right; on TVM's own CUDA runtime, whose driver computes
nothing (see ../emulation/test_cuda_idle.py), they are recorded and replayed as CUDA allows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fairy_compile as fc
from tests.emulation import cuda_graphs
from tests.emulation.test_cuda_idle import driver, missing_runtime, run_module  # noqa: F401
from tests.mlc.engine import MlcEngine
from tests.mlc.test_greedy import prompts
from tests.mlc.test_sampling import complete
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


@pytest.mark.skipif(missing_runtime() is not None, reason=str(missing_runtime()))
def test_a_real_runtime_records_and_replays(driver: Path, tmp_path: Path) -> None:  # noqa: F811
    source, out = tmp_path / "model", tmp_path / "out"
    save_model(source, "llama", hidden_size=256, intermediate_size=512)
    complete(source / "tokenizer.json")
    sizes = ["--context", "256", "--prefill-chunk", "64", "--max-batch", "4"]
    how = ["--target", "cuda-hopper", "--act", "int16", "--cuda-graphs", *sizes, "-o", str(out)]
    # In processes of their own: tests before these may simulate a device in this one.
    run_module("fairy_compile.cli", "build", str(source), *how)
    output = run_module("tests.mlc.idle_steps", str(out), driver=driver)
    found = json.loads(output.splitlines()[-1])
    assert found["violations"] == 0, found["violation"]
    assert all(row["graphs"] > 0 for row in found["rows"])
    # Nothing is recorded again for other settings and other texts.
    assert [row["instantiated"] for row in found["rows"][2:]] == [0] * 4
