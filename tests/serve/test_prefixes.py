"""Reuse of prefixes on a tiny model: what is kept, what is reused, what gives way. No HTTP."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.serve.prefixes import Prefixes, common_length
from fairy_compile.serve.scheduler import Scheduler
from tests.runtime.conftest import make_engine, tiny  # noqa: F401 - fixtures
from tests.runtime.tiny_library import CHUNK
from tests.serve.test_scheduler import Client, make_model, run  # noqa: F401 - fixture

SYSTEM = list(range(1, 2 * CHUNK + 6))  # two whole chunks and a part of one


def always(_kept: int, _pages: int) -> bool:
    return True


def scheduler_for(model, exact=True):
    prefixes = Prefixes(model.engine, exact=exact)
    return Scheduler(model, 4, exact=exact, prefixes=prefixes)


def answer(scheduler, prompt, max_tokens=6):
    client = Client(prompt, max_tokens, continues_prompt=True)
    run(scheduler, client)
    return client


def test_common_length():
    assert common_length([1, 2, 3], [1, 2, 4]) == 2
    assert common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([], [1]) == 0


def test_whole_chunks_are_reused_and_answers_are_those_of_one_stream(make_model):  # noqa: F811
    model = make_model()
    scheduler = scheduler_for(model)
    for question, cached in (([90, 91], 0), ([92], 2 * CHUNK), ([93, 94, 95], 2 * CHUNK)):
        client = answer(scheduler, SYSTEM + question)
        assert client.end.cached_tokens == cached
        expected = model.generate(SYSTEM + question, 6, temperature=0.0)
        assert client.text == expected


@pytest.mark.parametrize("length", [CHUNK, 2 * CHUNK, 2 * CHUNK + 1])
def test_the_last_token_of_a_prompt_is_always_run(make_model, length):  # noqa: F811
    model = make_model()
    scheduler = scheduler_for(model)
    prompt = SYSTEM[:length]
    first, again = answer(scheduler, prompt), answer(scheduler, prompt)
    assert again.end.cached_tokens == (length - 1) // CHUNK * CHUNK
    assert again.text == first.text


def test_logits_after_reuse_are_those_without_bit_for_bit(make_model):  # noqa: F811
    """Also of decode, and beside others that have the same prefix."""
    engine = make_model().engine
    prefixes = Prefixes(engine, exact=True)
    prompt = [*SYSTEM, 90, 91]
    plain = engine.add_sequence()
    want = [engine.prefill(plain, prompt), engine.decode([plain], [7])[0]]
    engine.remove_sequence(plain)
    other = engine.add_sequence()
    engine.prefill(other, [*SYSTEM, 99])
    prefixes.keep(other, [*SYSTEM, 99], len(SYSTEM) + 1)
    sequence, cached = prefixes.begin(prompt, {}, always)
    assert (sequence, cached) == (other, 2 * CHUNK)
    assert engine.length(sequence) == cached
    np.testing.assert_array_equal(engine.prefill(sequence, prompt[cached:]), want[0])
    np.testing.assert_array_equal(engine.decode([sequence], [7])[0], want[1])


@pytest.mark.parametrize("shared", [5, 16, 21, 32, 37], ids="{} tokens".format)
def test_forks_at_and_within_pages_continue_the_prefix(make_model, shared):  # noqa: F811
    """Not exact: attention over two sets of pages rounds to float16 or float32 in between."""
    engine = make_model().engine
    prefixes = Prefixes(engine, exact=False)
    prompt = [*SYSTEM[:shared], 200, 201, 202]
    plain = engine.add_sequence()
    want = engine.prefill(plain, prompt)
    engine.remove_sequence(plain)
    parent = engine.add_sequence()
    engine.prefill(parent, SYSTEM)
    prefixes.keep(parent, SYSTEM, len(SYSTEM))
    child, cached = prefixes.begin(prompt, {}, always)
    assert cached == shared
    assert child != parent
    got = engine.prefill(child, prompt[cached:])
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    # The parent is as it was.
    again, cached = prefixes.begin([*SYSTEM, 9], {}, always)
    assert cached == len(SYSTEM)
    np.testing.assert_allclose(
        engine.prefill(again, [9]),
        engine.prefill(_fresh(engine), [*SYSTEM, 9]),
        atol=1e-4 * np.abs(want).max(),
    )


def _fresh(engine) -> int:
    return engine.add_sequence()


def test_a_running_answer_can_be_forked(make_model):  # noqa: F811
    scheduler = scheduler_for(make_model(), exact=False)
    first, second = Client(SYSTEM, 12), Client([*SYSTEM, 50], 2)
    scheduler.add(first.request)
    while not scheduler.running or not scheduler.running[0].prefilled:
        scheduler.step()
    scheduler.add(second.request)
    while scheduler.step():
        pass
    assert second.end.cached_tokens == len(SYSTEM)
    assert first.end.completion_tokens == 12


def test_a_conversation_goes_on_where_it_ended(make_model):  # noqa: F811
    """Not exact: also what was decoded is reused."""
    model = make_model()
    scheduler = scheduler_for(model, exact=False)
    first = Client(SYSTEM[:10], 8)
    run(scheduler, first)
    (tokens,) = scheduler.prefixes._kept.values()
    assert len(tokens) == 10 + 7  # the last token was drawn, not run
    second = answer(scheduler, [*tokens, 60])
    assert second.end.cached_tokens == len(tokens)
    assert len(scheduler.prefixes) == 1  # the longer one covers the shorter


def test_kept_sequences_give_way_the_least_recently_used_first(make_model):  # noqa: F811
    """Four sequences; each of four prompts leaves one chunk."""
    model = make_model()
    scheduler = scheduler_for(model)
    prompts = [[100 + i] * (CHUNK + 1) for i in range(4)]
    for prompt in prompts:
        answer(scheduler, prompt, 1)
    assert len(scheduler.prefixes) == 4
    assert answer(scheduler, prompts[0], 1).end.cached_tokens == CHUNK  # used last from now on
    assert answer(scheduler, [5] * 4, 1).end.cached_tokens == 0  # needs a place: prompts[1] goes
    assert answer(scheduler, prompts[0], 1).end.cached_tokens == CHUNK
    assert answer(scheduler, prompts[1], 1).end.cached_tokens == 0


@pytest.mark.parametrize("exact", [True, False])
def test_no_answer_waits_for_kept_pages(make_model, exact):  # noqa: F811
    """Four pages in all: what is kept leaves when an answer needs its pages."""
    model = make_model(kv_tokens=64)
    scheduler = scheduler_for(model, exact)
    clients = []
    for i in range(6):
        clients.append(answer(scheduler, [*SYSTEM[:20], 70 + i], 40))
        used = model.engine.cache.used_pages
        assert used <= scheduler.prefixes.pages <= 4
    assert all(client.end.completion_tokens == 40 for client in clients)
    assert scheduler.reserved_pages == 0
    scheduler.prefixes.clear()
    assert model.engine.cache.used_pages == 0
    assert model.engine.cache.sequences == []


def test_failed_and_cancelled_answers_leave_nothing_wrong(make_model):  # noqa: F811
    model = make_model()
    scheduler = scheduler_for(model)
    client = Client(SYSTEM, 30)
    scheduler.add(client.request)
    scheduler.step()
    client.request.cancelled = True
    scheduler.step()
    again = answer(scheduler, SYSTEM)
    assert again.text == model.generate(SYSTEM, 6, temperature=0.0)
