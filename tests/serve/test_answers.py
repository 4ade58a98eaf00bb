"""Answers, as OpenAI's client gets them, beside those of the model run alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from .conftest import NAME

PROMPTS = [
    "def mean(values):",
    "import json\n",
    "class Stack:\n    def __init__(self",
    "for i in range(",
    "# Return the sum\n" * 30,  # two chunks of prefill
    "x",
    "try:\n    value = int(text)\nexcept ",
    '"""Tests',
]
CHAT = [{"role": "user", "content": "Hello"}]
NO_END = {"1": -100}  # the bundled model's end token


def complete(client, prompt, max_tokens=40, temperature=0.0, **options):
    return client.completions.create(
        model=NAME, prompt=prompt, max_tokens=max_tokens, temperature=temperature, **options
    )


def test_one_answer_is_that_of_generate(client, alone):
    for prompt in PROMPTS[:3]:
        reply = complete(client, prompt)
        assert reply.choices[0].text == alone.generate(prompt, 40, temperature=0.0)


def test_concurrent_clients_get_the_answers_they_would_get_alone(client, alone, engine):
    """More clients than sequences, prompts of different lengths, decode calls of many rows."""
    jobs = [(prompt, 20 + 7 * i) for i in range(4) for prompt in PROMPTS]
    own = engine.model.engine.library.has("batch_decode_exact")  # of kernels that need it
    decode = "batch_decode_exact" if own else "batch_decode"
    before = {name: count.calls for name, count in engine.model.engine.counts.items()}
    with ThreadPoolExecutor(len(jobs)) as pool:
        replies = list(pool.map(lambda job: complete(client, *job).choices[0].text, jobs))
    for (prompt, count), reply in zip(jobs, replies, strict=True):
        assert reply == alone.generate(prompt, count, temperature=0.0)
    after = engine.model.engine.counts[decode]
    assert after.calls > before.get(decode, 0)  # they did run together
    assert after.tokens > 2 * after.calls
    assert engine.load.kv_pages_reserved == 0
    assert engine.load.kv_pages_used == engine.load.kv_pages_kept


def test_chat_is_that_of_the_model(client, alone):
    reply = client.chat.completions.create(
        model=NAME, messages=CHAT, temperature=0, max_completion_tokens=60
    )
    choice = reply.choices[0]
    assert choice.message.content == alone.chat(CHAT, 60, temperature=0.0)
    assert choice.message.role == "assistant"
    assert reply.usage.prompt_tokens == len(alone.encode_chat(CHAT))
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    again = client.chat.completions.create(model=NAME, messages=parts, temperature=0, max_tokens=60)
    assert again.choices[0].message.content == choice.message.content


def test_stream_is_the_whole_answer_in_pieces(client):
    options = {"model": NAME, "messages": CHAT, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 10  # it came in pieces
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_completion_stream_without_usage(client):
    whole = complete(client, PROMPTS[0]).choices[0].text
    chunks = list(complete(client, PROMPTS[0], stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole
    assert all(c.usage is None for c in chunks)


def test_a_stop_string_ends_the_answer_and_is_not_shown(client):
    text = complete(client, PROMPTS[0]).choices[0].text
    stop = text[11:15]  # in the middle of tokens
    for options in ({}, {"stream": True}):
        reply = complete(client, PROMPTS[0], stop=[stop, "never"], **options)
        parts = list(reply) if options else [reply]
        got = "".join(part.choices[0].text for part in parts)
        assert got == text[: text.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_the_answer_ends_where_the_context_does(client, alone):
    tokens = alone.tokenizer.encode("x = 1\n" * 600)
    tokens = tokens[: alone.engine.context - 5]
    reply = complete(client, tokens, 100, logit_bias=NO_END)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 6  # the last token need not be fed
    full = complete(client, [*tokens, 5, 6, 7, 8, 9], 100, logit_bias=NO_END)
    assert full.usage.completion_tokens == 1


def test_logprobs_sum_to_the_likelihood_of_the_text(client, alone):
    prompt = PROMPTS[0]
    reply = complete(client, prompt, 12, logprobs=3)
    entry = reply.choices[0].logprobs
    start = alone.tokenizer.encode(prompt)
    drawn = alone.generate(prompt, 12, temperature=0.0, stream=True)
    drawn.read()
    # Token by token, as the server decoded: prefill's kernels round differently.
    engine, expected = alone.engine, 0.0
    sequence = engine.add_sequence()
    logits = engine.prefill(sequence, start).astype(np.float64)
    for token in drawn.tokens:
        expected += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        logits = engine.decode([sequence], [token])[0].astype(np.float64)
    engine.remove_sequence(sequence)
    assert sum(entry.token_logprobs) == pytest.approx(expected, abs=1e-9)
    assert "".join(entry.tokens) == reply.choices[0].text
    assert len(entry.tokens) == len(entry.top_logprobs) == reply.usage.completion_tokens
    for token, value, top in zip(
        entry.tokens, entry.token_logprobs, entry.top_logprobs, strict=True
    ):
        assert top[token] == value == max(top.values())  # greedy
        assert len(top) == 3
    offsets = np.cumsum([0, *map(len, entry.tokens)])[:-1]
    assert entry.text_offset == offsets.tolist()


def test_chat_logprobs_carry_bytes_and_come_in_streams(client):
    options = {
        "model": NAME,
        "messages": CHAT,
        "temperature": 0,
        "max_tokens": 15,
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = client.chat.completions.create(**options).choices[0]
    content = reply.logprobs.content
    assert b"".join(bytes(e.bytes) for e in content).decode() == reply.message.content
    assert all(len(e.top_logprobs) == 2 for e in content)
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.logprob for e in streamed] == [e.logprob for e in content]


def test_a_seed_repeats_its_answer_whatever_runs_beside_it(client, alone):
    def draw(seed):
        return complete(client, PROMPTS[0], temperature=1.0, seed=seed).choices[0].text

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(draw, [7, 8, 9] * 4))
    assert answers == answers[:3] * 4
    assert len(set(answers)) == 3
    assert answers[0] == alone.generate(PROMPTS[0], 40, temperature=1.0, seed=7)


def test_n_draws_different_answers_and_counts_the_prompt_once(client, alone):
    reply = complete(client, PROMPTS[:2], 10, temperature=1.0, seed=1, n=3)
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert len({choice.text for choice in reply.choices[:3]}) == 3
    assert reply.usage.prompt_tokens == sum(len(alone.tokenizer.encode(p)) for p in PROMPTS[:2])
    first = complete(client, PROMPTS[0], 10, temperature=1.0, seed=1)
    assert first.choices[0].text == reply.choices[0].text


def test_penalties_and_bias_reach_the_sampler(client, alone):
    reply = complete(client, "x = x = x =", 30, presence_penalty=1.5, frequency_penalty=1.0)
    assert reply.choices[0].text == alone.generate(
        "x = x = x =", 30, temperature=0.0, presence_penalty=1.5, frequency_penalty=1.0
    )
    forced = complete(client, "x", 3, logit_bias={"70": 100})
    assert forced.choices[0].text == alone.tokenizer.decode([70]) * 3


def test_json_schema_binds_the_answer(client):
    pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install '.[serve]'")
    schema = {
        "type": "object",
        "properties": {"pet": {"enum": ["cat", "dog"]}, "old": {"type": "boolean"}},
        "required": ["pet", "old"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model=NAME,
        messages=CHAT,
        temperature=1,
        seed=3,
        n=4,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}},
    )
    for choice in reply.choices:
        answer = json.loads(choice.message.content)
        assert set(answer) == {"pet", "old"}
        assert answer["pet"] in ("cat", "dog")
        assert isinstance(answer["old"], bool)
        assert choice.finish_reason == "stop"


def test_json_object_begins_as_one_and_bad_schemas_are_named(client):
    pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install '.[serve]'")
    reply = client.chat.completions.create(
        model=NAME,
        messages=CHAT,
        temperature=0,
        max_tokens=20,
        response_format={"type": "json_object"},
    )
    assert reply.choices[0].message.content.lstrip().startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense") as caught:
        client.chat.completions.create(model=NAME, messages=CHAT, response_format=bad)
    assert "cpp" not in str(caught.value)
    endless = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}
    for schema in ({"$ref": "#"}, endless):  # nothing may follow at all, and after {"a":
        bad["json_schema"] = {"name": "x", "schema": schema}
        with pytest.raises(openai.BadRequestError, match=r"no text .* conforms to the JSON schema"):
            client.chat.completions.create(model=NAME, messages=CHAT, response_format=bad)
