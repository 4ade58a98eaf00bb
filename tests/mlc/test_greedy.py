"""Every family in MLC's engine: greedy tokens are PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fairy_compile as fc
from tests.greedy import greedy
from tests.mlc.engine import MlcEngine
from tests.tiny_models import FAMILIES, Oracle, save_model

pytestmark = pytest.mark.slow
BUNDLED = Path(__file__).parents[2] / "examples" / "bundled" / "model"
CASES = [("cpu", family) for family in FAMILIES]
# Windows, capped scores and two ropes; experts; biases and a tied head.
CASES += [
    (device, family)
    for device in ("metal", "cuda", "vulkan", "opencl")
    for family in ("gemma2", "mixtral", "qwen2")
]


def prompts() -> list[list[int]]:
    """Return prompts of 1, 7 and 40 tokens, the last one longer than a prefill chunk."""
    rng = np.random.default_rng(5)
    return [rng.integers(3, 320, length).tolist() for length in (1, 7, 40)]


@pytest.mark.parametrize(("device", "family"), CASES)
def test_alone_and_together(build, device: str, family: str, tmp_path: Path) -> None:
    """Requests that come together join as others decode."""
    source = save_model(tmp_path / "model", family)
    oracle = Oracle(source, fc.QuantConfig("w2", act="float"))
    steps = 24 if device == "cpu" else 12
    want = [oracle.greedy(prompt, steps) for prompt in prompts()]
    engine = MlcEngine(build(device, source), device)
    alone = engine.generate(prompts()[:1], temperature=0, max_tokens=steps)
    together = engine.generate(prompts(), temperature=0, max_tokens=steps)
    assert [choices[0].tokens for choices in alone + together] == [want[0], *want]


def test_the_bundled_model_as_it_is_built_by_default(tmp_path: Path) -> None:
    """In int8, with keys in float16: the same functions give our runner and MLC's the same."""
    fc.build(BUNDLED, target="cpu", output=tmp_path / "out")
    with fc.load(tmp_path / "out") as model:
        texts = [model.tokenizer.encode(text) for text in ("def mean(values):", "import os\n", "x")]
        want = [greedy(model, text, 48) for text in texts]
    engine = MlcEngine(tmp_path / "out")
    for text, tokens in zip(texts, want, strict=True):
        ((answer,),) = engine.generate([text], temperature=0, max_tokens=48)
        assert answer.tokens == tokens
