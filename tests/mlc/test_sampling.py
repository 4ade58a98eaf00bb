"""What MLC's engine does with logits, by functions of the library, and with the KV cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer

import fairy_compile as fc
from fairy_compile.runtime.sampler import Sampler, SamplingParams
from tests.mlc.engine import Answer, MlcEngine
from tests.mlc.test_greedy import prompts
from tests.tiny_models import SIZES, Oracle, save_model

pytestmark = pytest.mark.slow
STEPS = 16
VOCABULARY = SIZES["vocab_size"]


class Loaded(NamedTuple):
    """An engine with a model, and PyTorch with the same one."""

    engine: MlcEngine
    oracle: Oracle


@pytest.fixture(scope="module", params=["cpu", "metal", "cuda", "vulkan", "opencl"])
def llama(request, build, tmp_path_factory) -> Loaded:
    """Return a Llama model on each device."""
    source = save_model(tmp_path_factory.mktemp("llama"), "llama")
    complete(source / "tokenizer.json")
    # Texts that grammars foresee are run like prompts, of all requests together.
    engine = MlcEngine(build(request.param, source, prefill_chunk=64), request.param)
    return Loaded(engine, Oracle(source, fc.QuantConfig("w2", act="float")))


def complete(path: Path) -> None:
    """Give every token of the model a text, and the end of texts a name that grammars know.

    MLC's engine looks texts of tokens up without looking whether there is one.
    """
    path.write_text(path.read_text("utf-8").replace("<|end|>", "</s>"), "utf-8")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"<{i}>" for i in range(tokenizer.get_vocab_size(), VOCABULARY)])
    tokenizer.save(str(path))


def check_logprobs(
    oracle: Oracle, prompt: list[int], answer: Answer, temperature: float = 1.0
) -> None:
    """Compare an answer's log probabilities with those of its tokens in PyTorch.

    Logits agree to 1e-4 of their norm, here 2e-3 at most; the engine writes six digits.
    """
    logits = oracle.logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1].astype(np.float64)
    off = 1e-4 * np.linalg.norm(logits, axis=-1).max() / temperature
    logits /= temperature
    sums = np.logaddexp.reduce(logits, axis=-1)
    want = logits[np.arange(len(answer.tokens)), answer.tokens] - sums
    np.testing.assert_allclose(answer.logprobs, want, rtol=1e-5, atol=2 * off)


def test_choices_of_one_prompt_fork_its_cache(llama) -> None:
    """One prompt at a time: of choices that wait for a place, the engine runs a token twice."""
    settings = {"n": 3, "temperature": 1.0, "max_tokens": STEPS, "logprobs": True, "seed": 3}
    for prompt in prompts():
        (choices,) = llama.engine.generate([prompt], **settings)
        assert len({tuple(answer.tokens) for answer in choices}) == 3
        for answer in choices:
            assert len(answer.tokens) == STEPS
            check_logprobs(llama.oracle, prompt, answer)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(llama, temperature: float) -> None:
    settings = {"temperature": temperature, "max_tokens": STEPS, "logprobs": True}
    (answer,) = llama.engine.generate([prompts()[1]], **settings)[0]
    check_logprobs(llama.oracle, prompts()[1], answer, temperature)


def test_nucleus(llama) -> None:
    """Tokens are of the fewest that reach top_p, and not always the likeliest."""
    settings = {"temperature": 0.4, "top_p": 0.6, "max_tokens": STEPS, "n": 3}
    likeliest = []
    for answer in llama.engine.generate([prompts()[1]], **settings)[0]:
        logits = llama.oracle.logits(prompts()[1] + answer.tokens)[len(prompts()[1]) - 1 : -1]
        for row, token in zip(logits.astype(np.float64) / 0.4, answer.tokens, strict=True):
            probs = np.exp(row - np.logaddexp.reduce(row))
            assert probs[probs > probs[token] + 1e-4].sum() < 0.6
            likeliest.append(probs.argmax() == token)
    assert 0 < sum(likeliest) < len(likeliest)


def test_a_prefix_that_was_seen_is_not_run_again(llama) -> None:
    """A conversation goes on, and others branch off in its middle."""
    engine, oracle = llama
    first = engine.generate([prompts()[2]], temperature=0, max_tokens=STEPS)[0][0].tokens
    texts = [prompts()[2] + first + [9, 8, 7], prompts()[2] + first[:10] + [5], prompts()[2][:20]]
    answers = engine.generate(texts, temperature=0, max_tokens=STEPS)
    assert [choices[0].tokens for choices in answers] == [oracle.greedy(t, STEPS) for t in texts]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.7, "presence_penalty": 0.4},
        {"logit_bias": {17: 3.0, 200: -100.0}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_penalties_and_biases_are_those_of_our_runner(llama, settings: dict[str, Any]) -> None:
    ours = SamplingParams(temperature=0.0, **settings)
    if "logit_bias" in settings:
        settings = {"logit_bias": {str(k): v for k, v in settings["logit_bias"].items()}}
    answers = llama.engine.generate(prompts(), temperature=0, max_tokens=STEPS, **settings)
    for prompt, (answer,) in zip(prompts(), answers, strict=True):
        sampler, text = Sampler(ours), list(prompt)
        for _ in range(STEPS):
            text.append(sampler.sample(llama.oracle.logits(text)[-1]))
        assert answer.tokens == text[len(prompt) :]


def test_json_schema(llama) -> None:
    """A grammar's mask rules tokens out; it ends the text where the value is complete."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yes"]}},
        "required": ["a", "b"],
    }
    tokenizer = Tokenizer.from_file(str(llama.engine.artifact / "tokenizer.json"))
    settings = {"response_format": {"type": "json_object", "schema": json.dumps(schema)}}
    answers = llama.engine.generate(prompts(), temperature=1.0, max_tokens=60, **settings)
    for (answer,) in answers:
        value = json.loads(tokenizer.decode(answer.tokens))
        assert value["a"] in (True, False)
        assert value["b"] in ("x", "yes")
