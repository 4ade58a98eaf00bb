"""Limits, mistakes, clients that leave, and what a server tells of itself."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from fairy_compile.serve.app import create_app

from .conftest import NAME
from .test_answers import NO_END, PROMPTS, complete

ENDLESS = {"max_tokens": 900, "logit_bias": NO_END, "temperature": 1.0}


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def counter(http: httpx.Client, line: str) -> float:
    for row in http.get("/metrics").text.splitlines():
        if row.startswith(line + " "):
            return float(row.rpartition(" ")[2])
    return 0.0


def is_error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "fairy_compile"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x"}, "model", "model"),
        ({"model": NAME}, "prompt", "prompt"),
        ({"model": NAME, "prompt": ""}, None, None),
        ({"model": NAME, "prompt": []}, "prompt", "no tokens"),
        ({"model": NAME, "prompt": {}}, "prompt", "prompt"),
        ({"model": NAME, "prompt": [1, -4]}, "prompt", "greater than or equal to 0"),
        ({"model": NAME, "prompt": [1, 999999]}, "prompt", "999999 is outside the vocabulary"),
        ({"model": NAME, "prompt": "x", "temperature": 3}, "temperature", "less than or equal"),
        ({"model": NAME, "prompt": "x", "temperature": "hot"}, "temperature", "number"),
        ({"model": NAME, "prompt": "x", "max_tokens": 0}, "max_tokens", "greater"),
        ({"model": NAME, "prompt": "x", "n": 100}, "n", "100 answers"),
        ({"model": NAME, "prompt": "x", "stop": ""}, "stop", "stop"),
        ({"model": NAME, "prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"model": NAME, "prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"model": NAME, "prompt": "x", "echo": True}, None, "echo is not supported"),
        ({"model": NAME, "prompt": "x", "stream_options": {}}, None, "stream"),
        ({"model": NAME, "prompt": "\ud800"}, None, "valid"),
    ],
)
def test_a_wrong_body_is_told_what_is_wrong(http, body, param, message):
    import json

    content = json.dumps(body).encode()
    response = http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    if message is None:  # the start token alone is a prompt
        assert response.status_code == 200
        return
    error = is_error(response, 400)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_null_is_a_field_left_out(http):
    common = dict.fromkeys(("n", "stream", "max_tokens", "stop", "seed", "logprobs", "tools"))
    common |= {"model": NAME, "temperature": 0}
    for path, body in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        response = http.post(f"/v1/{path}", json=common | body)
        assert response.status_code == 200, response.text
        given = {name: value for name, value in common.items() if value is not None}
        plain = http.post(f"/v1/{path}", json=given | body)
        assert response.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3", b"null"])
def test_malformed_bodies(http, content):
    is_error(
        http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}),
        400,
    )
    is_error(http.post("/v1/chat/completions", content=content), 400)


def test_unknown_paths_and_methods(http):
    is_error(http.get("/v1/nothing"), 404)
    is_error(http.get("/v1/completions"), 405)


@pytest.mark.parametrize("field", [{"tools": [{"type": "function"}]}, {"top_logprobs": 2}])
def test_chat_refuses_what_it_cannot_do(http, field):
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], **field}
    assert (
        next(iter(field)) in is_error(http.post("/v1/chat/completions", json=body), 400)["message"]
    )


@pytest.mark.parametrize("role", ["system", "developer", "tool", "wizard"])
def test_messages_that_the_template_leaves_out_are_refused(http, role):
    """The template of the bundled model shows the roles user and assistant alone."""
    messages = [{"role": role, "content": "Speak of tea."}, {"role": "user", "content": "Hi"}]
    body = {"model": NAME, "messages": messages, "max_tokens": 2}
    error = is_error(http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "messages"
    assert f"shows no messages of the role '{role}'" in error["message"]
    messages[0]["content"] = ""
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_images_are_refused(http):
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    body = {"model": NAME, "messages": [{"role": "user", "content": [image]}]}
    assert is_error(http.post("/v1/chat/completions", json=body), 400)["param"] == "messages"


def test_a_prompt_beyond_the_context_names_both_lengths(client, alone):
    count = len(alone.tokenizer.encode("word " * 2000))
    with pytest.raises(openai.BadRequestError, match=f"{count} tokens.* holds 1024") as caught:
        client.completions.create(model=NAME, prompt="word " * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_of_a_megabyte_and_a_body_beyond_the_limit(http):
    body = {"model": NAME, "prompt": "word " * 200_000}
    error = is_error(http.post("/v1/completions", json=body), 400)
    assert error["code"] == "context_length_exceeded"
    body["prompt"] *= 5
    assert "4194304" in is_error(http.post("/v1/completions", json=body), 413)["message"]

    def unannounced():
        for _ in range(5):
            yield b" " * (1 << 20)

    headers = {"Content-Type": "application/json"}
    is_error(http.post("/v1/completions", content=unannounced(), headers=headers), 413)


def test_a_client_that_leaves_frees_its_slot_and_harms_no_other(client, http, alone, engine):
    cancelled = counter(http, 'fairy_answers_total{reason="cancelled"}')
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, client, prompt, 60) for prompt in PROMPTS[:4]]
        for _ in range(3):
            stream = client.completions.create(model=NAME, prompt="x", stream=True, n=4, **ENDLESS)
            next(iter(stream))
            stream.close()
        for prompt, other in zip(PROMPTS, others, strict=False):
            expected = alone.generate(prompt, 60, temperature=0.0)
            assert other.result().choices[0].text == expected
    wait_until(lambda: engine.load.running == engine.load.waiting == 0)
    assert engine.load.kv_pages_reserved == 0
    assert engine.load.kv_pages_used == engine.load.kv_pages_kept
    assert counter(http, 'fairy_answers_total{reason="cancelled"}') == cancelled + 12


def test_a_client_that_leaves_without_a_stream_frees_its_slot_too(address, http, engine):
    cancelled = counter(http, 'fairy_answers_total{reason="cancelled"}')
    body = {"model": NAME, "prompt": "x", "n": 12, **ENDLESS}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/completions", json=body, timeout=0.2)
    wait_until(lambda: engine.load.running == engine.load.waiting == 0)
    assert counter(http, 'fairy_answers_total{reason="cancelled"}') > cancelled


def test_a_full_queue_answers_429_and_recovers(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "max_queue", 0)
    stream = client.completions.create(model=NAME, prompt="x", stream=True, n=12, **ENDLESS)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=NAME, prompt="x")
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert caught.value.code == "queue_full"
    stream.close()
    wait_until(lambda: engine.load.running == engine.load.waiting == 0)
    assert client.completions.create(model=NAME, prompt="x").choices


def test_long_prompts_do_not_stall_others(client, engine, alone):
    """Between two chunks of a long prompt every running answer gets a token."""
    tokens = (alone.tokenizer.encode("x = 1\n" * 600))[:1000]
    order = []
    inner = engine.model.engine
    prefill, decode = inner.prefill, inner.decode

    def logged(kind, function):
        def call(*args, **options):
            order.append(kind)
            return function(*args, **options)

        return call

    inner.prefill, inner.decode = logged("p", prefill), logged("d", decode)
    try:
        stream = client.completions.create(model=NAME, prompt="x", stream=True, **ENDLESS)
        next(iter(stream))
        complete(client, tokens, 2)
        stream.close()
    finally:
        inner.prefill, inner.decode = prefill, decode
    wait_until(lambda: engine.load.running == 0)
    first, last = order.index("p", 1), len(order) - 1 - order[::-1].index("p")
    assert "".join(order[first : last + 1]) == "pdpdpdp"  # 1000 tokens in chunks of 256


def test_api_key(engine):
    app = create_app(engine, NAME, api_key="secret")

    async def get(path, **headers):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as session:
            return await session.get(path, headers=headers)

    import asyncio

    for path in ("/v1/models", "/metrics", "/docs"):
        error = is_error(asyncio.run(get(path)), 401)
        assert error["code"] == "invalid_api_key"
        is_error(asyncio.run(get(path, Authorization="Bearer wrong")), 401)
        assert asyncio.run(get(path, Authorization="Bearer secret")).status_code == 200
    assert asyncio.run(get("/health")).status_code == 200


def test_names_of_other_sites_are_refused(http):
    reply = http.get("/v1/models", headers={"Host": "evil.example"})
    is_error(reply, 403)
    assert "--allow-host" in reply.json()["error"]["message"]


def test_a_prefix_is_run_once(client, http, alone, engine):
    """Whole chunks of it; the answer is that of one who has the model to himself."""
    chunk = engine.model.engine.chunk
    prefix = [5 + i % 300 for i in range(chunk)]
    name = "fairy_cached_prompt_tokens_total"
    for number in (0, 1):
        before = counter(http, name)
        prompt = [*prefix, 40 + number, 41]
        reply = complete(client, prompt, 12)
        cached = reply.usage.prompt_tokens_details.cached_tokens
        assert cached == number * chunk
        assert counter(http, name) - before == cached
        assert reply.choices[0].text == alone.generate(prompt, 12, temperature=0.0)


def test_health_and_metrics(client, http):
    assert http.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    names = (
        "fairy_prompt_tokens_total",
        "fairy_completion_tokens_total",
        "fairy_time_to_first_token_seconds_count",
        "fairy_answer_seconds_count",
        'fairy_http_requests_total{path="/v1/completions",status="200"}',
        'fairy_answers_total{reason="length"}',
    )
    before = [counter(http, name) for name in names]
    reply = complete(client, PROMPTS[0], 9)
    grown = [counter(http, name) - start for name, start in zip(names, before, strict=True)]
    assert grown == [reply.usage.prompt_tokens, 9, 1, 1, 1, 1]
    assert counter(http, "fairy_kv_pages_total") > 0
