"""Speculative decoding in MLC's engine: a draft model proposes, the model itself verifies."""

from __future__ import annotations

import numpy as np
import pytest

import fairy_compile as fc
from tests.emulation import cuda_graphs
from tests.mlc.engine import MlcEngine
from tests.mlc.test_greedy import prompts
from tests.mlc.test_sampling import complete
from tests.tiny_models import Oracle, save_model

pytestmark = pytest.mark.slow
STEPS, PROPOSED = 16, 3


@pytest.fixture(scope="module", params=["metal", "cuda", "vulkan"])
def models(request, build, tmp_path_factory):
    """Return start(draft) -> an engine with a W2 model and its draft, and PyTorch's W2."""
    source = save_model(tmp_path_factory.mktemp("pair"), "llama")
    complete(source / "tokenizer.json")
    # A call verifies as many tokens as there may be sequences.
    sizes = {"prefill_chunk": 64, "max_batch": 16}
    if request.param == "cuda":
        cuda_graphs.install()
        sizes["cuda_graphs"] = True
    artifacts = {q: build(request.param, source, quant=q, **sizes) for q in ("w2", "w3")}

    def start(draft: str) -> MlcEngine:
        return MlcEngine(
            artifacts["w2"],
            request.param,
            additional_models=[(str(artifacts[draft]), str(artifacts[draft] / "model.so"))],
            speculative_mode="small_draft",
            spec_draft_length=PROPOSED,
            max_num_sequence=16,
        )

    return start, Oracle(source, fc.QuantConfig("w2", act="float"))


@pytest.mark.parametrize("draft", ["w2", "w3"])
def test_greedy_tokens_are_those_of_pytorch(models, draft: str) -> None:
    """With a draft that is the model itself, all it proposes is accepted; with another, some."""
    start, oracle = models
    engine = start(draft)
    want = [oracle.greedy(prompt, STEPS) for prompt in prompts()]
    answers = engine.generate(prompts(), temperature=0, max_tokens=STEPS)
    assert [choices[0].tokens[:STEPS] for choices in answers] == want
    proposed, accepted = engine.drafts()
    assert accepted[0] == proposed[0] > 0  # the token before them
    ratios = np.array(accepted[1:]) / np.array(proposed[1:])
    assert ratios.min() == 1 if draft == "w2" else 0 < ratios[0] < 1


def test_answers_stop_where_the_draft_goes_on(models) -> None:
    """A text may end within what was accepted at once; the engine hands all of that out."""
    start, oracle = models
    want = oracle.greedy(prompts()[1], STEPS)
    for count in (5, 6, 7):
        (answer,) = start("w2").generate([prompts()[1]], temperature=0, max_tokens=count)[0]
        assert answer.tokens[:count] == want[:count]
        assert answer.finish == "length"
